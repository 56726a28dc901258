"""What goes wrong in a run, what the user sees, and what is left: each fault is brought about and its outcome printed.

    python -m tests.fault_table

A Markdown table. Every row ends with a resumed run whose final weights are compared with the undisturbed run's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
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
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints


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
            "model": {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16},
            "batch_size": 12,
            "steps": 12,
            "log_every": 1,
            "checkpoint_every": 3,
            "max_skipped_steps": 3,
            "device": "cpu",
            "precision": "fp32",
            "tensorboard": False,
            "out": folder / "runs",
        },
    )


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(f"warning: {record.getMessage()}")


class Faults:
    """Brings faults about, one run each."""

    def __init__(self, folder: Path) -> None:
        self.config = small_run(folder)
        self.expected = self.weights(Trainer(configs.replace(self.config, {"name": "undisturbed"})).fit().run_dir)
        self.rows: list[tuple[str, str, str]] = []

    def weights(self, run: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = checkpoints.load_latest(run / "checkpoints")["model"]
        return found

    def add(
        self,
        fault: str,
        disturb: Callable[[Trainer], object] | None = None,
        *,
        damage: Callable[[Path], object] | None = None,
        resume_with: dict[str, object] | None = None,
    ) -> None:
        """Run with a disturbance, or run whole and damage the folder; then resume plainly and compare."""
        config = configs.replace(self.config, {"name": f"run{len(self.rows)}"})
        run = config.out / config.name
        seen = ""
        if disturb is not None:
            trainer = Trainer(config)
            disturb(trainer)
            seen = self.attempt(trainer.fit)
        else:
            stopped = Trainer(config)
            stopped.total_steps = 9  # as if it had been killed there
            stopped.fit()
            (run / "encoder.safetensors").unlink()
        if damage is not None:
            damage(run)
        resume_config = configs.replace(config, resume_with or {})
        if resume_with is not None:
            seen = self.attempt(lambda: Trainer(resume_config, resume=run))
        left = ", ".join(map(str, checkpoints.saved_steps(run / "checkpoints"))) or "none"
        outcome: list[str] = []
        message = self.attempt(lambda: outcome.append(self.compare(Trainer(config, resume=run).fit().run_dir)))
        seen = seen or message
        end = f"then {outcome[0]}" if outcome else "cannot be resumed"
        self.rows.append((fault, seen or "nothing", f"checkpoints {left}; {end}"))

    def attempt(self, call: Callable[[], object]) -> str:
        """The error that a call ends with, or the warnings it gave."""
        warnings = _Warnings()
        logging.getLogger("byol_fast").addHandler(warnings)
        try:
            call()
        except Exception as error:
            warnings.seen = [f"{type(error).__name__}: {error}"]
        finally:
            logging.getLogger("byol_fast").removeHandler(warnings)
        return "; ".join(warnings.seen).replace(str(self.config.out.parent), "...")

    def compare(self, run: Path) -> str:
        found = self.weights(run)
        equal = all(torch.equal(found[name], self.expected[name]) for name in found)
        return "final weights equal" if equal else "final weights are of a run without the skipped steps"

    def table(self) -> str:
        lines = ["| fault | what the user sees | afterwards |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {a} | {b} | {c} |" for a, b, c in self.rows)])


def at_step(trainer: Trainer, step: int, act: Callable[[], object]) -> None:
    """Do something just before a step."""
    plain = trainer.train_step.__call__

    def disturbed(batch: Any, number: int) -> Any:
        if number == step:
            act()
        return plain(batch, number)

    trainer.train_step = disturbed  # type: ignore[assignment]


def poison(trainer: Trainer, steps: range) -> None:
    plain = trainer.train_step.__call__

    def poisoned(batch: Any, number: int) -> Any:
        if number in steps:
            view1 = batch.views[0].float() * math.nan
            batch = Batch((view1, batch.views[1].float()), batch.labels, batch.index)
        return plain(batch, number)

    trainer.train_step = poisoned  # type: ignore[assignment]


def no_memory(trainer: Trainer) -> None:
    """As a GPU that holds six images would answer."""
    forward = trainer.train_step.forward

    def too_large(view1: torch.Tensor, view2: torch.Tensor) -> Any:
        if len(view1) > 6 and trainer.state.step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(view1, view2)

    trainer.train_step.forward = too_large


@contextlib.contextmanager
def _file_size_limit(size: int) -> Any:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def disk_full(trainer: Trainer) -> None:
    """From step 7 on no file can grow beyond 100 kB."""
    fit = trainer.fit
    stack = contextlib.ExitStack()
    at_step(trainer, 7, lambda: stack.enter_context(_file_size_limit(100_000)))

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
    """The checkpoint folder is replaced by a file: also root cannot write into that."""

    def replace() -> None:
        folder = trainer.run_dir / "checkpoints"
        folder.rename(folder.with_name("kept"))
        folder.write_text("")

    at_step(trainer, 7, replace)


def make_old(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
        torch.save({"format": 1}, path)


def give_back(run: Path) -> None:
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        faults.add("SIGTERM in mid-epoch", lambda t: at_step(t, 7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        faults.add("SIGINT in mid-epoch", lambda t: at_step(t, 7, lambda: os.kill(os.getpid(), signal.SIGINT)))
        faults.add("disk full while a checkpoint is written", disk_full)
        faults.add("checkpoint folder cannot be written", unwritable, damage=give_back)
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
        faults.add("a batch that the GPU's memory does not hold", no_memory)
        print(faults.table())


if __name__ == "__main__":
    main()
