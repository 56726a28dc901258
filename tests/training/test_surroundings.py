"""Changes around a run, while it lasts or before it is resumed: working directory, disk, other folders and files."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast import pretrain
from byol_fast.config import Config, ConfigError
from byol_fast.export.encoder import export_run, load_encoder
from byol_fast.export.formats import export_as
from byol_fast.training import trainer as trainers
from byol_fast.training.callbacks import Callback
from byol_fast.training.errors import Interrupted
from byol_fast.training.resume import find_resumable
from byol_fast.training.run_dir import RunDir
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.files import atomic_path, atomic_write
from tests.training.helpers import AtStep, file_size_limit


def fail() -> None:
    raise ZeroDivisionError


def test_run_stays_in_its_folder_when_the_working_directory_changes(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    trainer = Trainer(
        configs.replace(small, {"out": "runs"}), callbacks=[AtStep(2, lambda: os.chdir(tmp_path / "third"))]
    )
    os.chdir(tmp_path / "second")
    result = trainer.fit()
    assert result.run_dir == tmp_path / "first" / "runs" / "tiny"
    assert checkpoints.saved_steps(result.run_dir / "checkpoints") == [3, 6]
    assert result.encoder.exists()
    assert not list((tmp_path / "second").iterdir()) and not list((tmp_path / "third").iterdir())


def test_run_that_fails_leaves_no_threads(small: Config) -> None:
    pytest.importorskip("torch.utils.tensorboard")  # imported here, not while the end of the run waits for it
    before = set(threading.enumerate())
    trainer = Trainer(configs.replace(small, {"log": ("tensorboard",)}), callbacks=[AtStep(2, fail)])
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert set(threading.enumerate()) <= before
    assert not (trainer.run_dir / ".lock").exists()


def test_signal_during_the_export_does_not_stop_it(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    export = vars(trainers)["export_encoder"]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return export(*args, **kwargs)

    monkeypatch.setattr(trainers, "export_encoder", interrupted)
    result = Trainer(small).fit()
    assert result.encoder.exists()
    assert RunDir(result.run_dir).is_finished()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ending", ["full disk", "interruption"])
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_complete_run_stays_complete_if_its_resumption_does_not_come_to_its_end(
    small: Config, ending: str, checkpoint: str
) -> None:
    class Interrupt(Callback):
        def on_run_begin(self, trainer: Trainer) -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    run = Trainer(small).fit().run_dir
    last = checkpoints.path_at_step(run / "checkpoints", 6)
    if checkpoint == "best":
        checkpoints.save_as_best(last)
        last.unlink()
    status = run / "status.json"
    status.write_text('{"finished": true, "problem": "collapsed"}')
    resumed = Trainer(small, resume=run, callbacks=[Interrupt()] if ending == "interruption" else [])
    with (
        pytest.raises((KeyboardInterrupt, Interrupted, ConfigError, CheckpointError)),
        file_size_limit(8000 if ending == "full disk" else 10**9),
    ):
        resumed.fit()
    assert RunDir(run).problem() == "collapsed"
    for path in [last, *run.glob("checkpoints/best_*")]:
        path.unlink(missing_ok=True)
    with pytest.raises(ZeroDivisionError):
        Trainer(small, resume=run, callbacks=[AtStep(5, fail)]).fit()
    assert not RunDir(run).is_finished()  # it was trained further


def test_export_to_a_full_disk_is_explained(small: Config, tmp_path: Path) -> None:
    run = Trainer(small).fit().run_dir
    encoder, metadata = load_encoder(run)
    metadata["encoder"], metadata["cifar_stem"] = "resnet18", False  # a name that timm has
    before = (run / "encoder.safetensors").read_bytes()
    with file_size_limit(1000):
        for export in (
            lambda: export_run(run),
            lambda: export_as(encoder, metadata, "timm", tmp_path / "timm"),
            lambda: export_as(encoder, metadata, "torch-export", tmp_path / "program"),
        ):
            with pytest.raises(ConfigError, match="export: .* cannot be written .*File too large.*; choose another"):
                export()
        with pytest.raises(CheckpointError, match=r"GiB free there; OSError: .Errno 27. File too large\)"):
            checkpoints.save(tmp_path, 3, {"x": torch.zeros(100_000), "y": torch.zeros(100_000)})
    assert (run / "encoder.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []


@pytest.mark.parametrize("content", [None, "[1]", "5", "\x80"])
def test_resume_auto_passes_over_foreign_folders(small: Config, content: str | None) -> None:
    with pytest.raises(ZeroDivisionError):
        Trainer(small, callbacks=[AtStep(4, fail)]).fit()
    foreign = small.out / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints" / "step_100.pt").touch()
    if content is None:
        (foreign / "config.json").mkdir()  # an error of the system, as for a folder of somebody else
    else:
        (foreign / "config.json").write_bytes(content.encode("latin-1"))
    os.utime(foreign, (2**32, 2**32))  # the newest
    assert find_resumable(configs.replace(small, {"name": ""})) == small.out / "tiny"


def test_users_files_in_the_folder_of_a_run_without_checkpoint_are_kept(small: Config) -> None:
    run = small.out / "tiny"
    run.mkdir(parents=True)
    (run / "job.out").write_text("mine")
    (run / ".notes.txt.a1b2c3d4.tmp").touch()  # perhaps another program's that writes atomically
    for config in (None, '{"architectures": ["ResNet"]}'):  # none, and another program's
        if config is not None:
            (run / "config.json").write_text(config)
        with pytest.raises(ConfigError, match="must be a new run's folder, it is not empty"):
            Trainer(small)
        assert (run / ".notes.txt.a1b2c3d4.tmp").exists()
    (run / "config.json").write_text(json.dumps(configs.to_dict(small)))
    for resume in (None, run):
        Trainer(small, resume=resume).close()
    (run / "encoder.safetensors").touch()  # its checkpoints are gone
    with pytest.raises(ConfigError, match="must be a new run's folder, it is not empty"):
        Trainer(small, resume=run)
    (run / "encoder.safetensors").unlink()
    assert Trainer(small, resume=run).fit().steps == 6
    assert (run / "job.out").read_text() == "mine"


def test_checkpoint_in_place_of_a_run_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "step_000000003.pt").touch()
    with pytest.raises(ConfigError, match="config.json does not exist; give the run folder"):
        pretrain(resume=tmp_path / "step_000000003.pt")


def test_damaged_checkpoint_is_not_kept_as_the_best(
    small: Config, npz: Path, photos: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """The best is a file of its own after a copy that knows no links, and damage to the other one is not seen in it."""
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    small = configs.replace(small, {"knn": {"val_root": val, "every_epochs": 1, "k": 3}})
    with pytest.raises(ZeroDivisionError):
        Trainer(small, callbacks=[AtStep(6, fail)]).fit()
    run = small.out / "tiny"
    best, path = (run / "checkpoints" / f"{prefix}step_000000005.pt" for prefix in ("best_", ""))
    path.unlink()
    path.write_bytes(best.read_bytes()[:-1])
    (run / "metrics.jsonl").unlink()  # the step is evaluated again
    assert Trainer(small, resume=run).fit().steps == 6
    assert "step_000000005.pt is damaged" in caplog.text
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoints.load(checkpoint)


def test_files_have_the_permissions_of_the_program(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_folder_that_cannot_be_synchronized(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fail_for_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    if code == errno.EINVAL:  # some network file systems
        atomic_write(tmp_path / "a", "x")
    else:
        with pytest.raises(OSError, match="Input/output"), atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_interrupted_run_on_images_of_a_program_says_how_to_go_on(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line cannot read them."""
    monkeypatch.chdir(tmp_path)
    assert small.data.root is not None
    images = np.load(small.data.root)["images"]
    config = configs.replace(small, {"data.root": None})
    interrupt = AtStep(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as interrupted:
        pretrain(images, config, callbacks=[interrupt])
    path = str(interrupted.value.run_dir.relative_to(tmp_path))
    expected = f"SIGTERM: saved after step 2; go on with: byol_fast.pretrain(data, resume={path!r}), with the same data"
    assert str(interrupted.value) == expected
    assert pretrain(images, resume=path).steps == 6
