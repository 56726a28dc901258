"""Which checkpoints a run saves, which ones it resumes from, and what must be finite in them."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.data import Batch
from byol_fast.export.encoder import export_run, load_encoder
from byol_fast.export.formats import export_as
from byol_fast.training.distributed import World
from byol_fast.training.errors import Interrupted, TrainingError
from byol_fast.training.restore import restore_latest
from byol_fast.training.run_dir import RunDir
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.errors import CheckpointError
from tests.training.helpers import SMALL_RUN

T = TypeVar("T")


@pytest.fixture
def small(tiny: Config, small_network: None) -> Config:
    """`tiny` with a network of milliseconds and without trackers."""
    return configs.replace(tiny, SMALL_RUN)


def steps_of(trainer: Trainer) -> list[int]:
    return checkpoints.saved_steps(trainer.run_dir / "checkpoints")


def poison(trainer: Trainer, steps: Collection[int], stop_at: int = 0) -> None:
    """Set the first view of these steps, counted from 1, to NaN; send SIGTERM in one of them."""
    plain = trainer.train_step.__call__

    def poisoned(batches: list[Batch], number: int) -> Any:
        if number + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        scale = math.nan if number + 1 in steps else 1 / 255
        batches = [Batch((b.views[0].float() * scale, b.views[1].float() / 255), b.labels, b.index) for b in batches]
        return plain(batches, number)

    trainer.train_step = poisoned  # type: ignore[assignment]


def rewrite(run: Path, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a changed checkpoint, with a checksum that matches."""
    payload = checkpoints.load(checkpoints.path_at_step(run / "checkpoints", step))
    change(payload)
    checkpoints.save(run / "checkpoints", step, payload)


def test_periodic_checkpoint_waits_for_the_end_of_a_series_of_skipped_steps(small: Config) -> None:
    trainer = Trainer(configs.replace(small, {"log_every": 100}))
    poison(trainer, {3, 5, 6, 11, 12})
    trainer.fit()
    assert steps_of(trainer) == [7, 10, 12]  # every 5 steps; the end of the run saves also within a series
    payloads = [checkpoints.load(path) for path in checkpoints.newest_first(trainer.run_dir / "checkpoints")]
    assert [p["skipped_in_a_row"] for p in payloads] == [2, 0, 0]


def test_stop_within_a_series_of_skipped_steps_deletes_no_good_checkpoint(small: Config) -> None:
    config = configs.replace(small, {"checkpoint_every": 2, "keep_checkpoints": 2, "max_skipped_steps": 4})
    trainer = Trainer(config)
    poison(trainer, range(5, 100), stop_at=7)
    with pytest.raises(Interrupted, match="saved after step 7"):
        trainer.fit()
    assert steps_of(trainer) == [2, 4, 7]

    resumed = Trainer(config, resume=trainer.run_dir)
    poison(resumed, range(5, 100))
    with pytest.raises(TrainingError, match="4 steps in a row, to step 8, .*; the last good checkpoint is of step 4"):
        resumed.fit()
    assert steps_of(resumed) == [2, 4, 7]

    resumed = Trainer(config, resume=trainer.run_dir)
    poison(resumed, ())
    resumed.fit()
    assert steps_of(resumed) == [10, 12]


def test_run_that_never_had_a_good_checkpoint_says_so(small: Config) -> None:
    trainer = Trainer(configs.replace(small, {"checkpoint_every": 2, "max_skipped_steps": 5}))
    poison(trainer, range(1, 100), stop_at=3)
    with pytest.raises(Interrupted):
        trainer.fit()
    resumed = Trainer(trainer.config, resume=trainer.run_dir)
    poison(resumed, range(1, 100))
    with pytest.raises(TrainingError, match="5 steps in a row, to step 5, .*; there is no good checkpoint yet"):
        resumed.fit()
    assert steps_of(trainer) == [3]


def test_best_checkpoint_within_a_series_is_kept_beside_the_earlier_one(
    small: Config, npz: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    knn = {"val_root": val, "every_epochs": 1, "k": 3}
    trainer = Trainer(configs.replace(small, {"knn": knn, "steps": 10, "checkpoint_every": 20}))
    evaluate = trainer._evaluate

    def better_than_before() -> Any:
        trainer.state.best = -1.0
        return evaluate()

    monkeypatch.setattr(trainer, "_evaluate", better_than_before)
    poison(trainer, {9, 10})
    trainer.fit()  # evaluates at 5 and 10
    names = ["best_step_000000005.pt", "best_step_000000010.pt", "step_000000005.pt", "step_000000010.pt"]
    assert sorted(path.name for path in (trainer.run_dir / "checkpoints").iterdir()) == names


@pytest.mark.parametrize("name", ["target.encoder.conv3.weight", "online.encoder.bn2.running_mean", "momentum_buffer"])
def test_state_that_is_not_finite_is_not_saved(small: Config, name: str) -> None:
    trainer = Trainer(small)
    update = trainer.train_step.update_weights_and_target

    def spoil() -> None:
        update()
        if trainer.state.step == 9:
            states = trainer.state.optimizer.state
            (tensor,) = (v for k, v in (trainer.model.state_dict() | next(iter(states.values()))).items() if k == name)
            tensor.select(0, 0).fill_(math.nan)

    trainer.train_step.update_weights_and_target = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=f"{name}.* is not finite after step 10; the last good .* is of step 5"):
        trainer.fit()
    assert steps_of(trainer) == [5]


def test_checkpoint_that_cannot_be_restored_gives_way_to_the_one_before(small: Config) -> None:
    trainer = Trainer(small)
    run = trainer.fit().run_dir
    whole = checkpoints.use_latest(run / "checkpoints", checkpoints.load)["model"]
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda payload: payload.pop("optimizer"),
        lambda payload: payload.update(config="{"),
        lambda payload: payload.update(processes=[{}]),
        lambda payload: payload["processes"][0].update(rng=torch.zeros(3)),
        lambda payload: payload["model"].popitem(),
        lambda payload: payload["optimizer"]["param_groups"].pop(),
        lambda payload: payload["model"]["target.encoder.bn1.running_mean"].fill_(math.nan),
        lambda payload: payload["optimizer"]["state"][1]["momentum_buffer"].fill_(math.inf),
        lambda payload: payload.update(environment="[]"),
        lambda payload: payload.update(environment='{"packages": 3}'),
    ]
    for change in changes:
        rewrite(run, 12, change)
        resumed = Trainer(small, resume=run)
        assert resumed.state.step == 10
        resumed.fit()
        weights = checkpoints.use_latest(run / "checkpoints", checkpoints.load)
        assert weights["step"] == 12 and all(torch.equal(weights["model"][key], whole[key]) for key in whole)
    for step in (5, 10, 12):
        rewrite(run, step, changes[0])
    with pytest.raises(CheckpointError, match="no usable checkpoint .*000000012.pt cannot be restored .KeyError: 'opt"):
        Trainer(small, resume=run)


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shape": (
        lambda p: p["model"].update({"online.encoder.bn1.weight": torch.ones(3)}),
        r"online.encoder.bn1.weight must be \[\d+\], got \[3\]",
    ),
    "type": (
        lambda p: p["model"].update({"online.encoder.bn1.num_batches_tracked": 7}),
        "cannot be restored .AttributeError",
    ),
    "unknown": (lambda p: p["model"].update(other=torch.ones(3)), "other is unknown"),
    "momentum": (
        lambda p: p["optimizer"]["state"][1].update(momentum_buffer=torch.ones(2, 2)),
        r"momentum_buffer of the optimizer's parameter 1 must be \[\d+\], got \[2, 2\]",
    ),
    "rng_size": (lambda p: p["processes"][0].update(rng=torch.zeros(3, dtype=torch.uint8)), "rng must be 5056 bytes"),
    "rng_type": (lambda p: p["processes"][0].update(rng="x"), "rng must be 5056 bytes"),
    "rng_content": (lambda p: p["processes"][0]["rng"].fill_(255), "rng is no state of a random number generator"),
    "step": (lambda p: p.update(step="12"), 'step must be a whole number, got "12"'),
    "best": (lambda p: p.update(best=None), "best must be a number, got null"),
    "batch": (
        lambda p: p["processes"][0]["loader"].update(batch_number="x"),
        "process.loader.batch_number must be a whole number",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHECKPOINT_FAULTS.values(), ids=CHECKPOINT_FAULTS)
def test_state_that_does_not_fit_is_named_and_changes_nothing(
    change: Callable[[dict[str, Any]], object], message: str, small: Config
) -> None:
    trainer = Trainer(small)
    payload = trainer.state.state_dict() | {"config": json.dumps(configs.to_dict(small)), "environment": "{}"}
    payload = copy.deepcopy(payload)
    for tensor in payload["model"].values():
        tensor.add_(1)
    payload["optimizer"]["state"] = {1: {"momentum_buffer": torch.ones_like(trainer.model.trainable_parameters()[1])}}
    change(payload)
    checkpoints.save(trainer.run_dir / "checkpoints", 12, payload)
    before = copy.deepcopy(trainer.state.state_dict())
    with pytest.raises(CheckpointError, match=message):
        restore_latest(trainer.state, RunDir(trainer.run_dir), small, {})
    after = trainer.state.state_dict()
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    assert torch.equal(after["processes"][0]["rng"], before["processes"][0]["rng"])
    assert after["optimizer"] == before["optimizer"]


class SecondProcessFails(World):
    """Stands for two processes, the second of which cannot read the first checkpoint that they try."""

    answers: ClassVar = ["checkpoint: step_000000012.pt cannot be read (OSError)"]

    def all_gather(self, value: T) -> list[T]:
        return [value, cast("T", self.answers.pop() if self.answers else None)]


def test_processes_resume_from_the_same_checkpoint(small: Config, caplog: pytest.LogCaptureFixture) -> None:
    run = Trainer(small).fit().run_dir
    resumed = Trainer(small, resume=run)
    assert resumed.state.step == 12
    resumed.state.world = SecondProcessFails()
    restore_latest(resumed.state, RunDir(run), small, resumed.environment)
    assert resumed.state.step == 10
    assert (
        "000012.pt cannot be read" in caplog.text and f"used instead, {run}/checkpoints/step_000000010" in caplog.text
    )


def test_encoder_that_is_not_finite_is_not_exported(small: Config, tmp_path: Path) -> None:
    run = Trainer(configs.replace(small, {"steps": 10})).fit().run_dir

    def spoil(payload: dict[str, Any]) -> None:
        payload["model"]["online.encoder.bn1.running_mean"][2] = math.nan

    rewrite(run, 10, spoil)
    weights, metadata = export_run(run, tmp_path / "earlier")
    expected = checkpoints.load(checkpoints.path_at_step(run / "checkpoints", 5))["model"]
    exported = load_file(weights)
    assert exported and all(torch.equal(exported[key], expected["online.encoder." + key]) for key in exported)
    assert json.loads(metadata.read_text())["step"] == 5
    rewrite(run, 5, spoil)
    with pytest.raises(CheckpointError, match=r"step_000000010.pt must be finite, but bn1.running_mean is not"):
        export_run(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    encoder, about = load_encoder(run)
    encoder.state_dict()["bn1.running_mean"][2] = math.nan
    with pytest.raises(CheckpointError, match="export: the encoder must be finite, but bn1.running_mean is not"):
        export_as(encoder, about, "torch-export", tmp_path / "none")


def test_encoder_of_a_checkpoint_with_other_types_is_not_exported(small: Config, tmp_path: Path) -> None:
    run = Trainer(configs.replace(small, {"steps": 10})).fit().run_dir
    rewrite(run, 10, lambda payload: payload.update(feature_dim=[1]))
    assert json.loads(export_run(run, tmp_path)[1].read_text())["step"] == 5


def test_damaged_export_is_explained(small: Config) -> None:
    run = Trainer(configs.replace(small, {"steps": 2})).fit().run_dir
    weights, metadata = run / "encoder.safetensors", run / "encoder.json"
    intact = metadata.read_text()
    before = json.loads(intact)["preprocessing"]
    others: tuple[dict[str, Any], ...] = (
        {"mean": [0.5, "x", 1]},
        {"interpolation": None},
        {"rotate": True},
        {"crop": 0},
    )
    changes = ({"image_size": 10**9}, {"preprocessing": {}}, *({"preprocessing": before | other} for other in others))
    wrong = [json.dumps(json.loads(intact) | change) for change in changes]
    deep = "[" * 100_000
    for text in ("{", "[]", intact.replace("image_size", "image_syze"), "\x80", *wrong, deep):
        metadata.write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="encoder.json is damaged .*write it again with `byol-fast export"):
            load_encoder(run)
    metadata.write_text(intact)
    data = weights.read_bytes()
    for content in (data[:-5], b"", data.replace(b"conv2.weight", b"conv2.weihgt")):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="encoder.safetensors is damaged"):
            load_encoder(run)
    for path in (weights, metadata):
        path.unlink()
        path.mkdir()
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged .IsADirectoryError"):
            load_encoder(run)
        path.rmdir()
        path.write_bytes(data)
