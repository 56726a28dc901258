"""Sections of a dry run. Each runs in a process of its own: `python -m tests.dry.sections NAME`.

Numbers mean nothing here, because no kernel runs: only exceptions are failures.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.items import ITEMS
from byol_fast import config as configs
from byol_fast.bench.speed_plan import SpeedPlan, speed_run_config
from byol_fast.bench.speed_run import train_all
from byol_fast.cli import profile as profile_command
from byol_fast.config import Config, recipes
from byol_fast.evaluate.knn import KNNResult
from byol_fast.training.callbacks import Callback
from byol_fast.training.knn_monitor import EvalMetrics, KNNMonitor
from byol_fast.training.train_step import StepOutput
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint
from tests.dry import FAILED, OK, operators
from tests.dry.small_steps import STEPS, Combination, aot_eager, batch, build_step, combinations

ROOT = Path(__file__).parents[2]
IMAGES, CLASSES = 60, 3
TRAINER_STEPS = 6


def attempt(name: str, work: Callable[[], str]) -> None:
    """Run something and print one line: that it went well, or how it failed.

    Args:
        name: of what is run.
        work: returns details for the line.
    """
    begin = time.perf_counter()
    try:
        with aot_eager():
            line = f"{OK} {name}: {work()}"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = (str(error).strip() or "no message").splitlines()[-1]
        line = f"{FAILED} {name}: {type(error).__name__}: {message}{_place(error)}"
    print(f"{line} ({time.perf_counter() - begin:.1f} s)", flush=True)


def _place(error: BaseException) -> str:
    """The innermost line of the package that an error passed."""
    files = {ROOT / "byol_fast", ROOT / "kernels", ROOT / "benchmarks"}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if files & set(Path(f.filename).parents)]
    return f" [{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}]" if frames else ""


class Counts(NamedTuple):
    """Kernel launches, and times that the host waited for the device."""

    launches: int
    waits: int

    @classmethod
    def now(cls) -> Counts:
        """Since the process started."""
        shim = importlib.import_module("fake_gpu")._shim
        return cls(shim.shim_count(0), shim.shim_count(1))

    def since(self, before: Counts) -> str:
        """Difference to an earlier count, as text."""
        return f"{self.launches - before.launches} launches, {self.waits - before.waits} host waits a step"


# ------------------------------------------------------------------------------------------------ sections


def small_steps(_: Path) -> None:
    """Every combination of the small step; writes the file of CUDA operators."""
    calls: operators.Calls = {}
    for combination in combinations():
        recorder = operators.OperatorRecorder()
        attempt(f"small step, {combination}", functools.partial(_small_step, combination, recorder))
        for name, dtypes in recorder.calls.items():
            calls.setdefault(name, set()).update(dtypes)
    operators.write(calls)
    print(f"{OK} {operators.FILE.relative_to(ROOT)}: {sum(map(len, calls.values()))} pairs of operator and dtypes")


def _small_step(combination: Combination, recorder: operators.OperatorRecorder) -> str:
    step = build_step(combination, torch.device("cuda", 0), recorder.note_parameters)
    views = batch()
    with recorder:
        for k in range(STEPS):
            before = Counts.now()
            step(views, k)
    return Counts.now().since(before)


# Every pair of two of these: mode, precision, optimizer, loader.
RUNS = (
    ("eager", "bf16", "lars", "threaded"),
    ("eager", "fp16", "sgd", "device_cache"),
    ("eager", "fp32", "adamw", "threaded"),
    ("compile", "bf16", "sgd", "threaded"),
    ("compile", "fp16", "adamw", "threaded"),
    ("compile", "fp32", "lars", "device_cache"),
    ("compile", "fp16", "lars", "threaded"),
    ("graph", "bf16", "adamw", "device_cache"),
    ("graph", "bf16", "lars", "device_cache"),
    ("graph", "fp32", "sgd", "threaded"),
)


def trainer(folder: Path) -> None:
    """Whole runs: half of the steps, a checkpoint, and the other half by a resumed trainer."""
    write_images(folder)
    for number, run in enumerate(RUNS):
        config = configs.replace(run_config(folder, *run), {"name": f"run{number}"})
        attempt(f"trainer, {' '.join(run)}", functools.partial(_fit_and_resume, config))
    attempt("speed run", functools.partial(_speed_run, folder))


def local_views(folder: Path) -> None:
    """A captured run in bf16 whose views have three sizes."""
    write_images(folder)
    changes = {"name": "local", "view2.size": 12, "num_local_views": 2, "local_view.size": 8}
    config = configs.replace(run_config(folder, *RUNS[8]), changes)
    attempt(f"trainer, {' '.join(RUNS[8])}, local views", functools.partial(_fit_and_resume, config))


class _CountAndStop(Callback):
    """Counts a step's launches and host waits, and stops a run after some steps."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.counts: list[Counts] = []

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        self.counts.append(Counts.now())
        if trainer.state.step == self.stop_at:
            trainer.stop()


def _fit_and_resume(config: Config) -> str:
    first, second = (_CountAndStop(stop_at) for stop_at in (TRAINER_STEPS // 2, TRAINER_STEPS))
    # Memory that no kernel has written holds anything, and tensors that are not finite are neither saved nor resumed.
    with mock.patch.object(checkpoint, "nonfinite", return_value=[]):
        torch._dynamo.reset()
        run_dir = Trainer(config, callbacks=[first]).fit().run_dir
        torch._dynamo.reset()
        resumed = Trainer(config, resume=run_dir, callbacks=[second])
        if resumed.state.step != first.stop_at:
            raise AssertionError(f"resumed at step {resumed.state.step}, stopped at step {first.stop_at}")
        resumed.fit()
    return second.counts[-1].since(second.counts[-2])


def _speed_run(folder: Path) -> str:
    """`byol-fast bench cifar10` with epochs that fit a time, in a captured step."""
    config = configs.replace(run_config(folder, "graph", "bf16", "sgd", "device_cache"), {"steps": 0, "epochs": 2})
    config = configs.replace(config, {"knn.val_root": folder / "images.npz"})
    plan = SpeedPlan(configs=(speed_run_config(config),), output=folder / "cifar10", minutes=10.0)
    # kNN refuses labels that no kernel has copied.
    knn = KNNResult(top1=0.5, top5=1.0, num_train=IMAGES, num_test=IMAGES, k=20)
    metrics = EvalMetrics(knn=knn, num_train=IMAGES, num_val=IMAGES, rankme=1.0, probe_top1=None, is_full=False)
    evaluation = mock.patch.object(KNNMonitor, "__call__", lambda *_, **__: metrics)
    with mock.patch.object(checkpoint, "nonfinite", return_value=[]), evaluation:
        (log,) = train_all(plan)
    return ", ".join(f"epoch {line['epoch']:g} {line['watts']} W" for line in log.evaluations)


def profile(folder: Path) -> None:
    """`byol-fast profile`."""
    write_images(folder)
    for run in RUNS[0], RUNS[8]:
        config = configs.replace(run_config(folder, *run), {"name": "-".join(run)})
        attempt(f"profile, {' '.join(run)}", functools.partial(_profile, config))


def _profile(config: Config) -> str:
    torch._dynamo.reset()
    config.out.mkdir(exist_ok=True)
    run_dir = config.out / config.name
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(configs.to_dict(config)))
    code = profile_command.main(["--resume", str(run_dir), "--steps", "3"])
    if code:
        raise AssertionError(f"exit code {code}")
    return ", ".join(sorted(p.name for p in (run_dir / "profile").iterdir()))


def gpu_queue(folder: Path) -> None:
    """Every item of the GPU queue with tiny sizes, run as `make gpu` runs them, but those that need a real GPU."""
    for item in ITEMS:
        if item.not_rehearsed:
            print(f"{OK} GPU queue, {item.name}: left out, {item.not_rehearsed}", flush=True)
    waiting = [item.name for item in ITEMS if not item.not_rehearsed]
    if not waiting:
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "30", "--only", ",".join(waiting)]
    command += ["--results", str(folder / "results"), "--out", str(folder / "out")]
    with subprocess.Popen(command, env=os.environ | {"BYOL_FAST_DRY": "1"}, stdout=subprocess.PIPE, text=True) as queue:
        assert queue.stdout is not None
        for line in queue.stdout:
            sys.stderr.write(line)
            name, _, outcome = line.removeprefix("---- ").strip().partition(": ")
            if not line.startswith("---- ") or name not in waiting:
                continue
            waiting.remove(name)
            # The last line of a result says how the item ended; one that lacks a file or program here has no result.
            ends = [json.loads(path.read_text().splitlines()[-1]) for path in folder.glob(f"results/*/{name}.jsonl")]
            ok = any(end.get("status") == "complete" for end in ends) or outcome.startswith("skipped: missing")
            print(f"{OK if ok else FAILED} GPU queue, {name}: {outcome}", flush=True)
    for name in waiting:
        print(f"{FAILED} GPU queue, {name}: the queue ended with exit code {queue.returncode} before it", flush=True)


SECTIONS = {"steps": small_steps, "trainer": trainer, "local": local_views, "profile": profile, "queue": gpu_queue}


# ------------------------------------------------------------------------------------------------ a run's config


def write_images(folder: Path) -> None:
    """Random images of three classes, as an array and as a folder of JPEGs."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    np.savez(folder / "images.npz", images=images, labels=labels)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "images" / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def run_config(folder: Path, mode: str, precision: str, optimizer: str, loader: str) -> Config:
    """A run of some steps on the images that `write_images` has written."""
    view = {"size": 16, "blur_p": 0.3}
    root = folder / ("images.npz" if loader == "device_cache" else "images")
    return configs.replace(
        recipes.cifar10_resnet18(),
        {
            "data": {"root": root, "threads": 1, "loader": loader},
            "view1": view,
            "view2": view,
            "model": {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16},
            "optim.name": optimizer,
            "mode": mode,
            "precision": precision,
            "device": "cuda",
            "batch_size": 12,
            "steps": TRAINER_STEPS,
            "log_every": 2,
            "knn.enabled": "off",
            "max_skipped_steps": 1000,  # whether a loss is finite is a matter of chance here
            "out": folder / "runs",
        },
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        SECTIONS[sys.argv[1]](Path(temporary))
