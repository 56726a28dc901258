"""A run killed thirty times at random moments, often while a checkpoint is written, equals an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.metrics import read
from byol_fast.utils import checkpoint as checkpoints

NUM_KILLS = 30
# Processes are forked from a server that has imported torch and torchvision: a start takes milliseconds, not seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["byol_fast.training.trainer", "torchvision", "torch.utils.tensorboard", "tests.networks"]
)


def train(config: Config) -> None:
    from byol_fast.models import encoders
    from byol_fast.report.callback import ReportCallback
    from byol_fast.training.resume import find_resumable
    from byol_fast.training.trainer import Trainer
    from tests.networks import SmallResidualNetwork

    encoders.OWN_ENCODERS["small"] = lambda **_: SmallResidualNetwork()
    torch.set_num_threads(1)
    Trainer(config, resume=find_resumable(config), callbacks=[ReportCallback()]).fit()


def start(config: Config) -> ForkServerProcess:
    process = CONTEXT.Process(target=train, args=(config,))
    process.start()
    return process


def is_writing(folder: Path) -> bool:
    try:
        return any(p.name.startswith(".step_") for p in folder.iterdir())
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_run_killed_thirty_times_equals_an_uninterrupted_run(tiny: Config) -> None:
    steps = 20 * NUM_KILLS
    changes = {"checkpoint_every": 1, "log_every": 3, "data.loader": "threaded", "model.encoder": "small"}
    config = configs.replace(tiny, changes | {"steps": steps})
    whole, killed = (configs.replace(config, {"name": name}) for name in ("whole", "killed"))
    reference = start(whole)
    reference.join()
    assert reference.exitcode == 0

    rng = random.Random(0)
    folder = killed.out / "killed" / "checkpoints"
    num_mid_write = 0
    for kill in range(NUM_KILLS):
        # Every other kill waits until a checkpoint is being written, the others for a random moment.
        wait_for_write = kill % 2 == 0
        until_step = max(checkpoints.saved_steps(folder), default=0) + rng.randint(0, 5)
        pause = rng.uniform(0, 0.05)
        process = start(killed)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            past_step = max(checkpoints.saved_steps(folder), default=0) > until_step
            if past_step and (not wait_for_write or is_writing(folder)):
                break
            time.sleep(0.0005)
        if not wait_for_write:
            time.sleep(pause)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        num_mid_write += is_writing(folder)
    final = start(killed)
    final.join()
    assert final.exitcode == 0

    assert num_mid_write >= NUM_KILLS // 4
    a, b = (checkpoints.load_latest(c.out / c.name / "checkpoints") for c in (whole, killed))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert all(
        torch.equal(x["momentum_buffer"], y["momentum_buffer"])
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    )
    records, expected = (
        [(r["step"], r["loss"]) for r in read(c.out / c.name / "metrics.jsonl")] for c in (killed, whole)
    )
    assert records == expected
    assert [step for step, _ in records] == list(range(1, steps + 1))
    encoders = [(c.out / c.name / "encoder.safetensors").read_bytes() for c in (whole, killed)]
    assert encoders[0] == encoders[1]
    assert not is_writing(folder)
