"""Run folders: locks, what a killed process leaves, the mark of saved checkpoints, one run at a time in a process."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import byol_fast
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.export.encoder import export_run
from byol_fast.models import encoders
from byol_fast.profiling.run import profile
from byol_fast.training.callbacks import Callback
from byol_fast.training.locks import RunLock, exclusive
from byol_fast.training.resume import find_resumable
from byol_fast.training.run_dir import RunDir, open_run_dir
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.networks import SmallResidualNetwork
from tests.training.helpers import FORK_SERVER, AtStep, use_small_encoder


@contextmanager
def child(
    act: Callable[..., object], *arguments: object, server: bool = False
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that calls `act` with its end of a pipe; killed at the end of the block."""
    here, there = multiprocessing.Pipe()
    context = FORK_SERVER if server else multiprocessing.get_context("fork")
    process = context.Process(target=act, args=(there, *arguments))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


def hold(pipe: Connection, folder: Path) -> None:
    """Lock a folder, say so, and wait."""
    lock = RunLock(folder)
    pipe.send(lock.held)
    pipe.recv()


def train_and_wait(pipe: Connection, config: Config, step: int) -> None:
    """Train to a step, say so, and wait."""

    def wait() -> None:
        pipe.send(step)
        pipe.recv()

    use_small_encoder()
    Trainer(config, callbacks=[AtStep(step, wait)]).fit()


def open_and_wait(pipe: Connection, config: Config) -> None:
    """Open a new run folder, send its path, and wait."""
    run_dir, lock, _ = open_run_dir(config, None)
    pipe.send((run_dir.path, lock.held))
    pipe.recv()


def weights(run: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = checkpoints.use_latest(run / "checkpoints", checkpoints.load)["model"]
    return model


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def unfinished(config: Config, step: int = 4) -> Path:
    """Run folder of a run that ended by an error after a step."""

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Trainer(config, callbacks=[AtStep(step, fail)]).fit()
    run = config.out / config.name
    assert not (run / ".lock").exists()
    return run


# ---- locks


def test_folder_is_refused_while_another_process_holds_it_and_free_after_its_death(tmp_path: Path) -> None:
    with child(hold, tmp_path) as (process, pipe):
        assert pipe.recv()
        with pytest.raises(ConfigError, match=f"process {process.pid} on host {socket.gethostname()} is running in"):
            RunLock(tmp_path)
        assert process.is_alive()
        process.kill()
        process.join()
        assert (tmp_path / ".lock").exists()
        lock = RunLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_locks_of_a_process_are_not_held_by_the_process_that_it_forked(tmp_path: Path) -> None:
    def act(pipe: Connection) -> None:
        lock = RunLock(tmp_path)
        with exclusive():
            if os.fork() == 0:
                with exclusive():
                    pipe.send((os.getpid(), lock.held))
                    pipe.recv()
                    os._exit(0)
            signal.pause()

    with child(act) as (process, pipe):
        grandchild, held = pipe.recv()
        assert not held
        with pytest.raises(ConfigError, match="must be used by one run at a time"):
            RunLock(tmp_path)
        process.kill()
        process.join()
        os.kill(grandchild, 0)  # alive
        RunLock(tmp_path).release()
        pipe.send(None)


def test_lock_file_removed_between_opening_and_locking_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    folder = tmp_path / "run"

    def remove_then_lock(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(folder)  # as a start that failed does just now
        flock(handle, operation)

    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    lock = RunLock(folder)
    with (folder / ".lock").open() as file, pytest.raises(BlockingIOError):
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()


def test_lock_file_of_another_process_is_not_removed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    (tmp_path / ".lock").unlink()  # by hand
    with child(hold, tmp_path) as (_, pipe):
        assert pipe.recv()
        lock.release()
        with pytest.raises(ConfigError, match="must be used by one run at a time"):
            RunLock(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_a_warning_and_the_run_goes_on(
    small: Config, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert Trainer(configs.replace(small, {"steps": 1})).fit().steps == 1
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [w for w in warnings if "cannot be locked" in w] == warnings
    assert len(warnings) == 1


def test_folder_of_a_running_run_is_refused_to_runs_and_open_to_readers(small: Config) -> None:
    whole = Trainer(configs.replace(small, {"name": "whole"})).fit().run_dir
    run = small.out / "tiny"

    with child(train_and_wait, small, 4, server=True) as (process, pipe):
        assert pipe.recv() == 4
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for resume in (None, run, find_resumable(small), find_resumable(configs.replace(small, {"name": ""}))):
            with pytest.raises(ConfigError, match=f"process {process.pid} on host"):
                Trainer(small, resume=resume)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
        export_run(run)
        byol_fast.load_encoder(run)
        process.kill()
    assert find_resumable(configs.replace(small, {"name": ""})) == run  # exported, and not finished
    assert_equal(weights(Trainer(small, resume=run).fit().run_dir), weights(whole))
    assert not (run / ".lock").exists()


def test_runs_without_a_name_that_start_in_the_same_second_have_folders_of_their_own(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("byol_fast.training.run_dir.datetime", Clock)
    unnamed = configs.replace(small, {"name": "", "steps": 1})
    with child(open_and_wait, unnamed) as (_, pipe):
        first, held = pipe.recv()
        assert held
        second = Trainer(unnamed).fit().run_dir
    assert (first.name, second.name) == ("cifar10_resnet18-20260102-030405", "cifar10_resnet18-20260102-030405-2")


def test_failed_start_leaves_no_folder(small: Config) -> None:
    for changes in ({}, {"name": ""}):
        with pytest.raises(ConfigError, match="warmup_steps"):
            Trainer(configs.replace(small, {"optim.warmup_steps": 100, **changes}))
        assert not small.out.exists()


# ---- what killed processes leave


@pytest.mark.parametrize(
    "files",
    [
        [],
        [".lock"],
        [".config.json.abcd_123.tmp"],
        ["config.json", ".environment.json.abcd_123.tmp"],
        ["config.json", "environment.json", ".metrics.jsonl.abcd_123.tmp"],
        ["config.json", "environment.json", "metrics.jsonl", "checkpoints/.step_000000003.pt.abcd_123.tmp"],
    ],
)
def test_folder_of_a_run_killed_at_its_start_is_used_again(small: Config, files: list[str]) -> None:
    run = small.out / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    for name in files:
        (run / name).write_text(json.dumps(configs.to_dict(small)) if name == "config.json" else "")
    short = configs.replace(small, {"steps": 1})
    assert find_resumable(short) is None
    resume = run if "config.json" in files else None
    assert Trainer(short, resume=resume).fit().steps == 1
    assert [p.name for p in run.rglob(".*")] == []


def test_temporaries_in_an_unfinished_run_are_removed_and_other_files_kept(small: Config) -> None:
    run = unfinished(small)
    (run / "checkpoints" / ".step_000000006.pt.abcd_123.tmp").write_text("half")
    (run / ".encoder.safetensors.abcd_123.tmp").write_text("half")
    (run / ".notes").write_text("mine")
    assert Trainer(small, resume=run).fit().steps == 6
    assert [p.name for p in run.rglob(".*")] == [".notes"]


def test_exported_run_is_finished_only_at_its_end(small: Config) -> None:
    unnamed = configs.replace(small, {"name": ""})
    run = unfinished(small)
    export_run(run)
    assert find_resumable(unnamed) == run
    Trainer(small, resume=run).fit()
    assert json.loads((run / "status.json").read_text()) == {"finished": True}
    assert find_resumable(unnamed) is None
    assert find_resumable(small) == run


# ---- the mark of saved checkpoints


def test_deleted_checkpoints_are_refused_and_their_folder_can_be_put_back(small: Config) -> None:
    run = unfinished(small)
    assert json.loads((run / "status.json").read_text()) == {"finished": False}
    metrics = (run / "metrics.jsonl").read_text()
    (run / "checkpoints").rename(small.out / "elsewhere")
    starts: list[Callable[[], object]] = [
        lambda: Trainer(small),
        lambda: Trainer(small, resume=run),
        lambda: find_resumable(small),
        lambda: find_resumable(configs.replace(small, {"name": ""})),
    ]
    for start in starts:
        with pytest.raises(ConfigError, match="it holds none; put the folder back .* another --name"):
            start()
    assert (run / "metrics.jsonl").read_text() == metrics
    assert find_resumable(configs.replace(small, {"name": "another"})) is None
    (small.out / "elsewhere").rename(run / "checkpoints")
    resumed = Trainer(small, resume=run)
    assert resumed.state.step == 3
    assert resumed.fit().steps == 6


def test_best_checkpoint_alone_is_resumed(small: Config) -> None:
    run = unfinished(small)
    folder = run / "checkpoints"
    checkpoints.save_as_best(checkpoints.path_at_step(folder, 3))
    checkpoints.path_at_step(folder, 3).unlink()
    assert find_resumable(small) == run
    assert Trainer(small, resume=run).state.step == 3


def test_mark_that_a_kill_prevented_is_written_on_resume(small: Config) -> None:
    run = unfinished(small)
    (run / "status.json").unlink()  # killed between the first checkpoint and the mark
    resumed = Trainer(small, resume=run, callbacks=[AtStep(4, lambda: shutil.copytree(run, small.out / "copy"))])
    resumed.fit()
    assert RunDir(small.out / "copy").status.exists()


# ---- one run at a time in a process


def test_second_run_in_a_process_is_refused_and_changes_nothing(small: Config) -> None:
    whole = Trainer(configs.replace(small, {"name": "whole"})).fit().run_dir
    second = configs.replace(small, {"name": "second", "seed": 5})
    built = Trainer(configs.replace(small, {"name": "built"}))
    errors = []

    def start_others() -> None:
        for start in (lambda: Trainer(second), built.fit, lambda: byol_fast.pretrain(recipe=second)):
            with pytest.raises(RuntimeError, match="one run at a time can be built or trained in a process") as error:
                start()
            errors.append(error)

    first = Trainer(small, callbacks=[AtStep(2, start_others)]).fit().run_dir
    assert len(errors) == 3
    assert_equal(weights(first), weights(whole))
    assert not (small.out / "second").exists()


def test_run_beside_a_profile_is_refused(small: Config) -> None:
    class Start(Callback):
        def on_run_begin(self, trainer: Trainer) -> None:
            Trainer(configs.replace(small, {"name": "other"}))

    with pytest.raises(RuntimeError, match="one run at a time can be built or trained in a process"):
        profile(small, callbacks=[Start()])
    assert not (small.out / "tiny" / ".lock").exists()


class Dropout(SmallResidualNetwork):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5)


def test_trainer_built_in_between_changes_nothing(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.OWN_ENCODERS, "small", lambda **_: Dropout())
    alone = Trainer(configs.replace(small, {"name": "alone"})).fit().run_dir
    trainer = Trainer(small)
    between = Trainer(configs.replace(small, {"name": "other", "seed": 3, "precision": "tf32"}))
    assert torch.backends.cudnn.allow_tf32
    assert_equal(weights(trainer.fit().run_dir), weights(alone))
    assert not torch.backends.cudnn.allow_tf32
    between.close()
    assert not between.run_dir.exists()


def test_trainer_of_recipe_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config must be a byol_fast\.Config, got 'demo'; .*byol_fast\.pretrain"):
        Trainer("demo")  # type: ignore[arg-type]


def test_trainer_that_released_its_folder_is_refused(small: Config) -> None:
    first = Trainer(small)
    later = Trainer(small)
    with pytest.raises(RuntimeError, match="this one has released it; build another one"):
        first.fit()
    later.fit()
    with pytest.raises(RuntimeError, match="this one has released it; build another one"):
        later.fit()
    assert Trainer(small, resume=later.run_dir).fit().steps == 6
