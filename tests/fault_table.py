"""Faults in a run: the message, the remaining checkpoints, and the result of resuming, as a Markdown table.

    python -m tests.fault_table

Each fault is injected into a run of its own, which is then resumed; final weights are compared with an undisturbed run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_fast import config as configs
from byol_fast.config import Config, recipes
from byol_fast.data import Batch
from byol_fast.models import encoders
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.networks import SmallResidualNetwork
from tests.training.helpers import file_size_limit


def small_run(folder: Path) -> Config:
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    view = {"size": 16, "blur_p": 0.0}
    return configs.replace(
        recipes.cifar10_resnet18(),
        {
            "data": {"root": folder / "images.npz", "threads": 1, "loader": "threaded"},
            "view1": view,
            "view2": view,
            "model": {"encoder": "small", "hidden_dim": 32, "projection_dim": 16},
            "batch_size": 12,
            "steps": 12,
            "log_every": 1,
            "checkpoint_every": 3,
            "max_skipped_steps": 3,
            "device": "cpu",
            "precision": "fp32",
            "log": (),
            "memory_check": False,
            "out": folder / "runs",
        },
    )


class _Warnings(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"warning: {record.getMessage()}")


class Faults:
    """Injects faults, one run each."""

    def __init__(self, folder: Path) -> None:
        self.config = small_run(folder)
        self.expected = self.weights(Trainer(configs.replace(self.config, {"name": "undisturbed"})).fit().run_dir)
        self.rows: list[tuple[str, str, str]] = []

    def weights(self, run: Path) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = checkpoints.use_latest(run / "checkpoints", checkpoints.load)["model"]
        return weights

    def add(
        self,
        fault: str,
        disturb: Callable[[Trainer], object] | None = None,
        *,
        damage: Callable[[Path], object] | None = None,
        resume_with: dict[str, object] | None = None,
    ) -> None:
        """Run with `disturb`, or run nine steps and `damage` the folder; then resume and compare."""
        config = configs.replace(self.config, {"name": f"run{len(self.rows)}"})
        run = config.out / config.name
        message = ""
        if disturb is not None:
            trainer = Trainer(config)
            disturb(trainer)
            message = self.attempt(trainer.fit)
        else:
            stopped = Trainer(config)
            stopped.total_steps = 9  # as if killed there
            stopped.fit()
            (run / "encoder.safetensors").unlink()
        if damage is not None:
            damage(run)
        resume_config = configs.replace(config, resume_with or {})
        if resume_with is not None:
            message = self.attempt(lambda: Trainer(resume_config, resume=run))
        steps = ", ".join(map(str, checkpoints.saved_steps(run / "checkpoints"))) or "none"
        outcome: list[str] = []
        resumed = self.attempt(lambda: outcome.append(self.compare(Trainer(config, resume=run).fit().run_dir)))
        end = f"then {outcome[0]}" if outcome else "cannot be resumed"
        self.rows.append((fault, message or resumed or "nothing", f"checkpoints {steps}; {end}"))

    def attempt(self, call: Callable[[], object]) -> str:
        """The error of a call, or its warnings."""
        warnings = _Warnings()
        logging.getLogger("byol_fast").addHandler(warnings)
        try:
            call()
        except Exception as error:
            warnings.messages = [f"{type(error).__name__}: {error}"]
        finally:
            logging.getLogger("byol_fast").removeHandler(warnings)
        return "; ".join(warnings.messages).replace(str(self.config.out.parent), "...")

    def compare(self, run: Path) -> str:
        weights = self.weights(run)
        equal = all(torch.equal(weights[name], self.expected[name]) for name in weights)
        return "final weights equal" if equal else "final weights differ: steps were skipped"

    def table(self) -> str:
        lines = ["| fault | message | afterwards |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {a} | {b} | {c} |" for a, b, c in self.rows)])


def at_step(trainer: Trainer, step: int, act: Callable[[], object]) -> None:
    """Call `act` before a step."""
    plain = trainer.train_step.__call__

    def disturbed(batches: list[Batch], number: int) -> Any:
        if number == step:
            act()
        return plain(batches, number)

    trainer.train_step = disturbed  # type: ignore[assignment]


def poison(trainer: Trainer, steps: range) -> None:
    """Set the first view of these steps to NaN."""
    plain = trainer.train_step.__call__

    def poisoned(batches: list[Batch], number: int) -> Any:
        if number in steps:
            batches = [
                Batch((batch.views[0].float() * math.nan, batch.views[1].float()), batch.labels, batch.index)
                for batch in batches
            ]
        return plain(batches, number)

    trainer.train_step = poisoned  # type: ignore[assignment]


def no_memory(trainer: Trainer) -> None:
    """Raise as a GPU with memory for six images would."""
    forward = trainer.train_step.forward

    def too_large(view1: torch.Tensor, view2: torch.Tensor) -> Any:
        if len(view1) > 6 and trainer.state.step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(view1, view2)

    trainer.train_step.forward = too_large


def disk_full(trainer: Trainer) -> None:
    """Limit files to 20 kB from step 7 on."""
    fit = trainer.fit
    stack = contextlib.ExitStack()
    at_step(trainer, 7, lambda: stack.enter_context(file_size_limit(20_000)))

    def limited() -> Any:
        with stack:
            return fit()

    trainer.fit = limited  # type: ignore[method-assign]


def newest(run: Path) -> Path:
    folder = run / "checkpoints"
    return checkpoints.path_at_step(folder, checkpoints.saved_steps(folder)[-1])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unwritable(trainer: Trainer) -> None:
    """Replace the checkpoint folder by a file, into which root cannot write either."""

    def replace() -> None:
        folder = trainer.run_dir / "checkpoints"
        folder.rename(folder.with_name("moved"))
        folder.write_text("")

    at_step(trainer, 7, replace)


def make_old(run: Path) -> None:
    folder, current = run / "checkpoints", checkpoints.FORMAT
    steps = checkpoints.saved_steps(folder)
    shutil.rmtree(folder)
    checkpoints.FORMAT = 1
    for step in steps:
        checkpoints.save(folder, step, {})
    checkpoints.FORMAT = current


def restore_folder(run: Path) -> None:
    (run / "checkpoints").unlink()
    (run / "moved").rename(run / "checkpoints")


def main() -> None:
    torch.set_num_threads(1)
    encoders.OWN_ENCODERS["small"] = lambda **_: SmallResidualNetwork()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        faults.add("SIGTERM in mid-epoch", lambda t: at_step(t, 7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        faults.add("SIGINT in mid-epoch", lambda t: at_step(t, 7, lambda: os.kill(os.getpid(), signal.SIGINT)))
        faults.add("disk full while a checkpoint is written", disk_full)
        faults.add("checkpoint folder cannot be written", unwritable, damage=restore_folder)
        faults.add("newest checkpoint cut off", damage=lambda run: os.truncate(newest(run), 1000))
        faults.add("one bit of the newest checkpoint flipped", damage=lambda run: flip_bit(newest(run)))
        faults.add("newest checkpoint deleted", damage=lambda run: newest(run).unlink())
        faults.add(
            "all checkpoints damaged",
            damage=lambda run: [p.write_bytes(b"x") for p in (run / "checkpoints").iterdir()],
        )
        faults.add("checkpoint of another version", damage=make_old)
        faults.add("resumed with another learning rate", resume_with={"optim.lr": 3.0})
        faults.add("resumed with another batch size", resume_with={"batch_size": 6})
        other = Path(folder) / "other.npz"
        np.savez(other, images=np.zeros((60, 16, 16, 3), np.uint8))
        faults.add("resumed with other images", resume_with={"data.root": other})
        faults.add("one step with a NaN in a view", lambda t: poison(t, range(7, 8)))
        faults.add("NaN in every view from step 8 on", lambda t: poison(t, range(7, 99)))
        faults.add("a batch that does not fit in GPU memory", no_memory)
        print(faults.table())


if __name__ == "__main__":
    main()
