"""Chooses the settings of `byol-fast demo`: random search with successive halving on held-out training images.

    python -m benchmarks.demo_search search [--trials N] [--workers N] [--save FOLDER]
    python -m benchmarks.demo_search final [--seeds N] [--save FOLDER]

`search` trains on 8,000 of the demo's 10,000 training images and measures the accuracy on the other 2,000: as they are,
cropped, shifted and flipped, as the demo does at its end. The score is the mean of the four. Every trial of a round has
the same CPU time for its training: the number of steps follows from the images per CPU-second of its size and batch,
measured at the start. The best third of the random settings goes on to a longer round, then the neighbors of the best
one, and the best two to the longest round, beside the settings before the search and the best one with larger views. A
search that was cut goes on where it stopped. `final` runs the demo as it is, on all training images, once per seed;
only there the validation images are used.

Results: `search.jsonl`, a line for each measured speed and trial; `final.jsonl`, a line for each seed. Without `--save`
they are those of the repository, whose search is complete: an empty folder repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_fast import config as configs
from byol_fast.api import pretrain
from byol_fast.config import Config, recipes
from byol_fast.data.sources.arrays import open_demo
from byol_fast.training.moved_images import MovedImages
from byol_fast.training.resume import config_digest
from byol_fast.training.trainer import Trainer
from byol_fast.utils import env
from byol_fast.utils.files import atomic_write

FOLDER = Path(__file__).parent / "results" / "demo_cpu"
SPACE: dict[str, tuple[Any, ...]] = {
    "size": (24, 28, 32, 40),
    "smallest_crop": (0.1, 0.2, 0.3, 0.5),
    "batch_size": (32, 64, 128),
    "lr": (0.05, 0.1, 0.2, 0.4),
    "tau": (0.9, 0.95, 0.97, 0.99),
    "jitter": (0.0, 0.2, 0.4, 0.6),
    "blur_p": (0.0, 0.5, 1.0),
}
"""Values that are tried, of which the last two vary only beside the best; learning rates are for a batch of 256, `tau`
is that of the first step, `jitter` is that of brightness and contrast."""
BEFORE = dict(zip(SPACE, (28, 0.3, 64, 0.1, 0.97, 0.4, 0.5), strict=True))
"""Settings of the demo before the search, its first trial."""
SHORT, MIDDLE, LONG = 40.0, 120.0, 300.0
"""CPU-seconds of training of all trials; of the better third and of neighbors of the best; of the best two, of
`BEFORE`, and of the best with larger views. The demo has the best of the middle ones: where two threads train this
network hardly faster than one, its three minutes are that long."""
HELD_OUT = 200
"""Held-out images of each class."""


def config_of(settings: dict[str, Any], folder: Path, *, steps: int) -> Config:
    """The demo with other settings, on the images of `folder`, for some steps, with one thread."""
    view: dict[str, Any] = {
        "size": settings["size"],
        "scale": (settings["smallest_crop"], 1.0),
        "brightness": settings["jitter"],
        "contrast": settings["jitter"],
        "blur_p": settings["blur_p"],
    }
    changes: dict[str, Any] = {
        "view1": view,
        "view2": view,
        "batch_size": settings["batch_size"],
        "optim.lr": settings["lr"],
        "tau.base": settings["tau"],
        "steps": steps,
        "log": (),
        "data.root": folder / "images.npz",
        "data.threads": 1,
    }
    return configs.replace(recipes.demo(), changes)


def write_images(folder: Path) -> None:
    """Write `images.npz` with the demo's training images, of which the last of each class are for validation."""
    source, _ = open_demo()
    assert source.labels is not None
    by_class = [np.flatnonzero(source.labels == label) for label in range(len(source.classes))]
    held_out = np.zeros(len(source), dtype=bool)
    held_out[np.concatenate([index[-HELD_OUT:] for index in by_class])] = True
    np.savez(
        folder / "images.npz",
        images=source.images[~held_out],
        labels=source.labels[~held_out],
        val_images=source.images[held_out],
        val_labels=source.labels[held_out],
        classes=np.array(source.classes),
    )


def images_per_cpu_second(config: Config) -> float:
    """Speed of training with one thread, without the first steps."""
    with tempfile.TemporaryDirectory() as runs:
        trainer = Trainer(configs.replace(config, {"out": Path(runs), "knn.enabled": "off"}))
        steps = 2560 // config.batch_size
        for _ in range(5):
            trainer.train_one_step()
        start = time.process_time()
        for _ in range(steps):
            trainer.train_one_step()
        seconds = time.process_time() - start
        trainer.close()
    return steps * config.batch_size / seconds


def run_trial(settings: dict[str, Any], folder: Path, cpu_seconds: float, speed: float) -> dict[str, Any]:
    """Train, and measure the accuracy on the held-out images: a line of `search.jsonl`."""
    steps = round(cpu_seconds * speed / settings["batch_size"])
    start, moved_images = time.process_time(), MovedImages()
    with tempfile.TemporaryDirectory() as runs:
        config = configs.replace(config_of(settings, folder, steps=steps), {"out": Path(runs)})
        trainer = Trainer(config, callbacks=[moved_images])
        trainer.state.evaluated_at = 0  # the untrained encoder is not of interest
        trainer.fit()
    top1 = moved_images.top1["trained"]
    return {
        "trial": settings,
        "cpu_seconds": cpu_seconds,
        "steps": steps,
        "top1": top1,
        "score": sum(top1.values()) / len(top1),
        "process_cpu_seconds": round(time.process_time() - start, 1),
    }


class Search:
    """A search, whose results are in a file from which it goes on.

    Args:
        path: `search.jsonl`.
        folder: with the images.
        pool: runs the trials.
    """

    def __init__(self, path: Path, folder: Path, pool: ProcessPoolExecutor) -> None:
        self._path, self._folder, self._pool = path, folder, pool
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._trials = [line for line in lines if "trial" in line]
        self._speeds = {_shape(line): line["images_per_cpu_second"] for line in lines if "trial" not in line}

    def run(self, num_trials: int) -> None:
        """All rounds."""
        for size, batch_size in itertools.product(SPACE["size"], SPACE["batch_size"]):
            settings = BEFORE | {"size": size, "batch_size": batch_size}
            if _shape(settings) not in self._speeds:
                config = config_of(settings, self._folder, steps=1000)
                speed = round(self._pool.submit(images_per_cpu_second, config).result(), 1)
                self._speeds[_shape(settings)] = speed
                self._write({"size": size, "batch_size": batch_size, "images_per_cpu_second": speed})
        best = self._round(SHORT, random_settings(num_trials))[: num_trials // 3]
        best = self._round(MIDDLE, best)
        best = self._round(MIDDLE, best + neighbors(best[0]))
        larger = [best[0] | {"size": size} for size in (28, 32)]  # they learn more slowly
        self._round(LONG, [*best[:2], BEFORE, *larger])

    def _round(self, cpu_seconds: float, candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run the trials that have no result yet; returns the candidates, the best first."""

        def results() -> list[dict[str, Any]]:
            return [line for line in self._trials if line["cpu_seconds"] == cpu_seconds and line["trial"] in candidates]

        done = [line["trial"] for line in results()]
        futures = [
            self._pool.submit(run_trial, settings, self._folder, cpu_seconds, self._speeds[_shape(settings)])
            for settings in candidates
            if settings not in done
        ]
        for future in futures:
            self._trials.append(future.result())
            self._write(self._trials[-1])
        return [line["trial"] for line in sorted(results(), key=lambda line: -line["score"])]

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with self._path.open("a") as file:
            print(text, file=file)


def _shape(settings: dict[str, Any]) -> tuple[int, int]:
    """Size and batch size, on which the speed depends."""
    return settings["size"], settings["batch_size"]


def random_settings(count: int) -> list[dict[str, Any]]:
    """Settings of the first round, always the same ones: those before the search, then random ones."""
    varied = list(SPACE)[:-2]
    grid = list(itertools.product(*(SPACE[name] for name in varied)))
    rows = np.random.default_rng(0).permutation(len(grid))[: count - 1]
    return [BEFORE, *(BEFORE | dict(zip(varied, grid[row], strict=True)) for row in rows)]


def neighbors(best: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings with one value changed to the next larger or smaller one."""
    result = []
    for name, values in SPACE.items():
        position = values.index(best[name])
        result += [best | {name: values[i]} for i in (position - 1, position + 1) if 0 <= i < len(values)]
    return result


def search(save: Path, *, trials: int, workers: int) -> None:
    """Run or continue a search; writes `search.jsonl`."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(workers, context, one_thread) as pool:
        write_images(Path(name))
        Search(save / "search.jsonl", Path(name), pool).run(trials)


def one_thread() -> None:
    """Let torch use one thread in this process."""
    torch.set_num_threads(1)


def run_demo(seed: int) -> dict[str, Any]:
    """Run the demo: a line of `final.jsonl`, without its time."""
    moved_images = MovedImages()
    with tempfile.TemporaryDirectory() as runs:
        config = configs.replace(recipes.demo(), {"seed": seed, "out": Path(runs)})
        pretrain(recipe=config, callbacks=[moved_images])
    return {
        "seed": seed,
        "top1": moved_images.top1,
        "epochs": config.epochs,
        "num_val": len(open_demo()[1]),
        "command": f"byol-fast demo --seed {seed}",
        "config_digest": config_digest(config),
        "environment": env.describe_measurement(torch.device("cpu")),
    }


def final(save: Path, *, seeds: int) -> None:
    """Run the demo with several seeds, each in a process of its own; writes `final.jsonl`."""
    lines = []
    for seed in range(seeds):
        start = time.perf_counter()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            line = pool.submit(run_demo, seed).result()
        lines.append(line | {"seconds": round(time.perf_counter() - start, 1)})
        print(json.dumps(lines[-1]), flush=True)
    atomic_write(save / "final.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("search", "final"))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    if args.stage == "search":
        search(args.save, trials=args.trials, workers=args.workers)
    else:
        final(args.save, seeds=args.seeds)


if __name__ == "__main__":
    main()
