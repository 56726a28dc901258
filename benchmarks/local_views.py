"""Compares the demo with and without two local views, after equal epochs and after equal time.

    python -m benchmarks.local_views [--seeds N] [--workers N] [--save FOLDER]

Three settings, each with the same seeds: the demo as it is; with two local views for as many epochs; with two local
views for as many CPU-seconds of training, which are fewer epochs. How many follows from the CPU-seconds that both need
for an image, measured in turn at the start. Every run has one thread. All train on the demo's 10,000 training images
and are measured on its 2,000 validation images; nothing is selected there.

Results: `local_views.jsonl`, a line for the speeds, then one for each run. A comparison that was cut goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_search import FOLDER, images_per_cpu_second, one_thread
from byol_fast import config as configs
from byol_fast.config import Config, recipes
from byol_fast.data.sources.arrays import open_demo
from byol_fast.training.moved_images import MovedImages
from byol_fast.training.trainer import Trainer
from byol_fast.utils import env

NUM_LOCAL_VIEWS = 2
SPEED_ROUNDS = 5
SETTINGS = ("two views", "with local views, equal epochs", "with local views, equal time")


def config_of(num_local_views: int, *, steps: int = 0, seed: int = 0) -> Config:
    """The demo with local views, for its own epochs or some steps, with one thread."""
    changes = {"num_local_views": num_local_views, "steps": steps, "seed": seed, "log": (), "data.threads": 1}
    return configs.replace(recipes.demo(), changes)


def measure_speeds() -> dict[str, Any]:
    """Images per CPU-second of training without and with local views, medians over rounds in turn."""
    rounds = [[images_per_cpu_second(config_of(k)) for k in (0, NUM_LOCAL_VIEWS)] for _ in range(SPEED_ROUNDS)]
    without, with_local = zip(*rounds, strict=True)
    ratios = sorted(a / b for a, b in rounds)
    return {
        "images_per_cpu_second": [round(statistics.median(speeds), 1) for speeds in (without, with_local)],
        "time_ratio": round(statistics.median(ratios), 4),
        "time_ratios": [round(ratio, 4) for ratio in ratios],
    }


def run(setting: str, seed: int, time_ratio: float) -> dict[str, Any]:
    """Train with one of `SETTINGS`: a line of `local_views.jsonl`."""
    is_local, is_cut = setting != SETTINGS[0], setting == SETTINGS[2]
    num_local_views = NUM_LOCAL_VIEWS if is_local else 0
    steps_per_epoch = len(open_demo()[0]) // recipes.demo().batch_size
    steps = round(recipes.demo().epochs * steps_per_epoch / (time_ratio if is_cut else 1))
    start, moved_images = time.process_time(), MovedImages()
    with tempfile.TemporaryDirectory() as runs:
        config = config_of(num_local_views, steps=steps, seed=seed)
        Trainer(configs.replace(config, {"out": Path(runs)}), callbacks=[moved_images]).fit()
    return {
        "setting": setting,
        "seed": seed,
        "num_local_views": num_local_views,
        "local_size": config.local_view.size,
        "steps": steps,
        "epochs": round(steps / steps_per_epoch, 2),
        "top1": moved_images.top1["trained"],
        "num_val": len(open_demo()[1]),
        "process_cpu_seconds": round(time.process_time() - start, 1),
        "environment": env.describe_measurement(torch.device("cpu")),
    }


def compare(path: Path, *, seeds: int, workers: int) -> None:
    """Measure the speeds and run what has no result yet."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        with path.open("a") as file:
            print(json.dumps(line), file=file)

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), one_thread) as pool:
        if not lines:
            write(pool.submit(measure_speeds).result())
        done = [(line["setting"], line["seed"]) for line in lines[1:]]
        futures = [
            pool.submit(run, setting, seed, lines[0]["time_ratio"])
            for seed in range(seeds)
            for setting in SETTINGS
            if (setting, seed) not in done
        ]
        for future in futures:
            write(future.result())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    compare(args.save / "local_views.jsonl", seeds=args.seeds, workers=args.workers)


if __name__ == "__main__":
    main()
