"""Thirty SIGKILLs in one run, many of them while a checkpoint is being written: the run ends as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.metrics import read
from byol_fast.utils import checkpoint as checkpoints

KILLS = 30
CODE = """
import sys
from pathlib import Path
from byol_fast import config
from byol_fast.cli.main import main
from byol_fast.config import recipes
recipes.RECIPES["spec"] = lambda: config.load(Path(sys.argv[1]))
main(["train", "spec", "--resume", "auto"])
"""


def start(config: Config) -> subprocess.Popen[bytes]:
    folder = config.out / f"spec-{config.name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
    command = [sys.executable, "-c", CODE, str(folder / "config.json")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def being_written(folder: Path) -> bool:
    try:
        return any(p.name.startswith(".step_") for p in folder.iterdir())
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(tiny: Config) -> None:
    steps = 10 * KILLS
    config = configs.replace(tiny, {"steps": steps, "checkpoint_every": 1, "log_every": 3, "data.loader": "threaded"})
    whole, cut = (configs.replace(config, {"name": name}) for name in ("whole", "cut"))
    assert start(whole).wait(timeout=900) == 0

    dice = random.Random(0)
    folder = cut.out / "cut" / "checkpoints"
    kills = in_mid_write = 0
    while kills < KILLS:
        process = start(cut)
        begun = max(checkpoints.saved_steps(folder), default=0)
        wait_for_writing = kills % 2 == 0
        until_step = begun + dice.randint(0, 5)
        pause = dice.uniform(0, 0.05)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if max(checkpoints.saved_steps(folder), default=0) > until_step and (
                not wait_for_writing or being_written(folder)
            ):
                break
            time.sleep(0.0005)
        if not wait_for_writing:
            time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read().decode()
        kills += 1
        in_mid_write += being_written(folder)
    final = start(cut)
    assert final.wait(timeout=900) == 0, final.stderr and final.stderr.read().decode()

    assert in_mid_write >= KILLS // 4
    a, b = (checkpoints.load_latest(c.out / c.name / "checkpoints") for c in (whole, cut))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert all(
        torch.equal(x["momentum_buffer"], y["momentum_buffer"])
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    )
    records, expected = ([(r["step"], r["loss"]) for r in read(c.out / c.name / "metrics.jsonl")] for c in (cut, whole))
    assert records == expected
    assert [step for step, _ in records] == list(range(1, steps + 1))
    encoders = [(c.out / c.name / "encoder.safetensors").read_bytes() for c in (whole, cut)]
    assert encoders[0] == encoders[1]
    assert not being_written(folder)
    print(f"{kills} kills, {in_mid_write} of them left a half-written checkpoint")
