"""Several processes on the CPU (gloo): the same run as one process with all their images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.locks import RunLock
from byol_fast.training.metrics_file import read
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints

CODE = """
import sys
from pathlib import Path
from byol_fast import config
from byol_fast.cli.main import main
from byol_fast.config import recipes
recipes.RECIPES["spec"] = lambda: config.load(Path(sys.argv[1]))
main(["train", *sys.argv[2:]])
"""


def torchrun(
    config: Config, processes: int, *arguments: str, restarts: int = 0, before: str = ""
) -> subprocess.Popen[str]:
    folder = config.out / f"spec-{config.name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
    (folder / "run.py").write_text(before + CODE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.Popen(
        [
            *launcher,
            f"--max-restarts={restarts}",
            str(folder / "run.py"),
            str(folder / "config.json"),
            *(arguments or ("spec",)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read(run / "metrics.jsonl") if "loss" in r]


def payload(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = checkpoints.use_latest(run / "checkpoints", checkpoints.load)["model"]
    return weights


@pytest.fixture
def several(tiny: Config) -> Config:
    # A rate at which five steps of a network of this size do not yet amplify rounding.
    return configs.replace(tiny, {"optim.lr": 0.2, "steps": 5, "data.loader": "threaded", "checkpoint_every": 2})


def test_two_processes_are_one_with_the_doubled_batch(several: Config, photos: np.ndarray) -> None:
    """Losses, weights and running statistics of both networks: batch norm sees all images, gradients are averaged."""
    val = several.out.parent / "val.npz"
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    several = configs.replace(several, {"knn": {"val_root": val, "k": 3}})
    one = configs.replace(several, {"name": "one", "batch_size": 12})
    two = configs.replace(several, {"name": "two", "batch_size": 6})
    output = finished(torchrun(two, 2))
    for text in ("steps of 6 x 2 processes", "30 of 30 validation images are also training images"):
        assert output.replace("\n", " ").count(text) == 1  # one of them speaks
    finished(torchrun(one, 1))
    # Rounding, amplified by five steps; batch norm over half of the images would differ by tenths.
    assert losses(two.out / "two") == pytest.approx(losses(one.out / "one"), rel=1e-4)
    knn = [[r["knn_top1"] for r in read(c.out / c.name / "metrics.jsonl") if "knn_top1" in r] for c in (one, two)]
    assert len(knn[0]) == 2
    assert knn[0] == pytest.approx(knn[1], abs=2 / 30)
    a, b = payload(one.out / "one"), payload(two.out / "two")
    start = Trainer(configs.replace(one, {"name": "start"})).model.state_dict()
    for part in ("online.", "target."):
        names = [name for name in a if name.startswith(part) and a[name].is_floating_point()]
        apart, moved = (
            torch.cat([(b[n].double() - other[n].double()).flatten() for n in names]).norm() for other in (a, start)
        )
        assert apart < 0.02 * moved
    assert all(torch.equal(a[n], b[n]) for n in a if n.endswith("num_batches_tracked"))
    # Resumed with another number of processes: refused, and nothing lost.
    refused = torchrun(two, 1, "--resume", str(two.out / "two"))
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode != 0
    assert "the number of processes must be the run's, 2, got 1" in output
    assert checkpoints.saved_steps(two.out / "two" / "checkpoints")[-1] == 5


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_been(several: Config) -> None:
    long = {"steps": 60, "batch_size": 6}
    whole = configs.replace(several, {**long, "name": "whole"})
    cut = configs.replace(several, {**long, "name": "cut"})
    finished(torchrun(whole, 2))
    process = torchrun(cut, 2, "spec", "--name", "cut", "--resume", "auto", restarts=2)
    folder, deadline = cut.out / "cut" / "checkpoints", time.monotonic() + 120
    while not any(step >= 10 for step in checkpoints.saved_steps(folder)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    output = finished(process)
    assert "resuming after step" in output
    a, b = payload(whole.out / "whole"), payload(cut.out / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(whole.out / "whole") == losses(cut.out / "cut")


@pytest.mark.slow
def test_all_processes_end_when_the_run_folder_is_in_use(several: Config) -> None:
    config = configs.replace(several, {"batch_size": 6, "name": "two"})
    lock = RunLock(config.out / "two")
    output, _ = (process := torchrun(config, 2)).communicate(timeout=300)
    assert process.returncode != 0
    assert output.count(f"process {os.getpid()} on host") == 1
    assert lock.held
    lock.release()
    assert "step 5/5" in finished(torchrun(config, 2))


def _rank(launcher: int, rank: int) -> int:
    """The process that torchrun started as this rank."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"RANK=%d" % rank in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")
