"""A run that is killed at any of its file operations and resumed equals an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.metrics_file import read
from byol_fast.training.resume import find_resumable
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.training.file_operations import FileOperations
from tests.training.helpers import FORK_SERVER, SMALL_RUN, use_small_encoder

CLOCK = {"images_per_second", "data_wait", "peak_memory_gib"}
NUM_KILLS = 8


def train(config: Config, kill_at: int, connection: Connection) -> None:
    """Resume or start a run as `--resume auto` does; send the step at which it begins, and its file operations."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    use_small_encoder()
    operations = FileOperations(kill_at)
    trainer = Trainer(config, resume=find_resumable(config))
    begin = trainer.state.step
    trainer.fit()
    connection.send((begin, operations.count))


def run(config: Config, kill_at: int = 0) -> tuple[int, int]:
    """Train in a process of its own; returns its first step and the number of file operations, 0 if it was killed."""
    receiver, sender = FORK_SERVER.Pipe(duplex=False)
    process = FORK_SERVER.Process(target=train, args=(config, kill_at, sender))
    process.start()
    sender.close()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    result: tuple[int, int] = (0, 0) if kill_at else receiver.recv()
    return result


def outputs(folder: Path) -> dict[str, Any]:
    """Outputs of a run that must be bit for bit those of another one."""
    payload = checkpoints.use_latest(folder / "checkpoints", checkpoints.load)
    records = [{k: v for k, v in r.items() if k not in CLOCK} for r in read(folder / "metrics.jsonl")]
    # Killed between the last checkpoint and the deletion of the oldest, a run keeps one more.
    superfluous = {
        checkpoints.path_at_step(folder, step).name for step in checkpoints.saved_steps(folder / "checkpoints")[:-3]
    }
    return {
        "payload": {k: v for k, v in payload.items() if k not in {"config", "environment"}},
        "metrics": records,
        "encoder": (folder / "encoder.safetensors").read_bytes(),
        "metadata": json.loads((folder / "encoder.json").read_text()),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in superfluous),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "every", [pytest.param(True, marks=pytest.mark.slow, id="all"), pytest.param(False, id="some")]
)
def test_run_killed_at_a_file_operation_equals_an_uninterrupted_run(
    tiny: Config, npz: Path, photos: np.ndarray, every: bool
) -> None:
    """Twelve steps, a checkpoint every three, an evaluation and perhaps a best checkpoint every five."""
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 2)
    config = configs.replace(
        tiny, SMALL_RUN | {"checkpoint_every": 3, "knn": {"val_root": val, "every_epochs": 1, "k": 3}}
    )
    config.out.mkdir()  # so that no run creates it
    whole = configs.replace(config, {"name": "000"})  # names of one length, so that all files are of one length
    begin, count = run(whole)
    expected = outputs(whole.out / "000")
    assert begin == 0 and count > 10 * NUM_KILLS
    assert {"checkpoints/step_000000012.pt", "checkpoints/best_step_000000005.pt"} <= set(expected["files"])
    begins = set()
    for kill_at in range(1, count + 1) if every else [round((i + 0.5) * count / NUM_KILLS) for i in range(NUM_KILLS)]:
        killed = configs.replace(config, {"name": f"{kill_at:03}"})
        folder = killed.out / killed.name
        run(killed, kill_at)
        saved = max(checkpoints.saved_steps(folder / "checkpoints"), default=0)
        begin, _ = run(killed)
        assert begin == saved
        got = outputs(folder)
        assert [name for name in expected if not equal(got[name], expected[name])] == [], f"killed at {kill_at}"
        begins.add(begin)
    assert len(begins) >= 4
