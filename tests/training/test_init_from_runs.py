"""Runs that start from the weights of other runs: what is loaded, recorded and resumed, and the options."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.messages import startup_summary
from byol_fast.training.resume import find_resumable
from byol_fast.training.trainer import Trainer
from tests.training.helpers import AtStep, assert_target_is_a_copy


def fit(config: Config) -> tuple[Trainer, Path]:
    trainer = Trainer(config)
    return trainer, trainer.fit().run_dir


def started(config: Config, **options: Any) -> Trainer:
    """A trainer before its first step, which has given back its folder."""
    trainer = Trainer(config, **options)
    trainer.close()
    return trainer


def test_run_starts_from_another_run_or_its_export(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, run = fit(small)
    online = {name: tensor.clone() for name, tensor in trainer.model.online.state_dict().items()}

    monkeypatch.chdir(run.parent)
    config = configs.replace(small, {"init_from": "tiny", "name": "second", "seed": 5, "steps": 1})
    second = started(config)
    assert all(torch.equal(tensor, online[name]) for name, tensor in second.model.online.state_dict().items())
    assert_target_is_a_copy(second.model)
    assert f"initial weights of {run}/checkpoints/" in "\n".join(startup_summary(second._parts))
    assert "projector and predictor taken" in "\n".join(startup_summary(second._parts))

    _, folder = fit(config)
    sha256 = hashlib.sha256(max((run / "checkpoints").glob("step_*")).read_bytes()).hexdigest()
    lineage = {"init_from": str(run), "sha256": sha256}
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["init_from"], stored["init_sha256"]) == (lineage["init_from"], lineage["sha256"])
    assert json.loads((folder / "encoder.json").read_text())["lineage"] == lineage
    assert "lineage" not in json.loads((run / "encoder.json").read_text())

    changed = configs.replace(config, {"name": "third", "model.projector_layers": 3})
    third = started(changed)
    random = started(configs.replace(changed, {"init_from": "", "name": "fourth"}))
    from_export = started(configs.replace(config, {"init_from": run / "encoder.safetensors", "name": "fifth"}))
    for model, heads in ((third.model, random.model.online), (from_export.model, None)):
        encoder = model.encoder.state_dict()
        assert all(torch.equal(tensor, online[f"encoder.{name}"]) for name, tensor in encoder.items())
        if heads is not None:  # the projector does not fit, and a predictor of another's outputs is not taken
            state = model.online.state_dict()
            assert all(torch.equal(state[f"projector.{k}"], v) for k, v in heads.projector.state_dict().items())
            assert all(torch.equal(state[f"predictor.{k}"], v) for k, v in heads.predictor.state_dict().items())
    assert "taken" not in "\n".join(startup_summary(from_export._parts))


def test_resumed_run_keeps_its_initial_weights(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the initial weights is gone then; the same command finds the run, one of other weights does not."""
    _, run = fit(configs.replace(small, {"name": "source", "steps": 1}))
    path = (run / "encoder.safetensors").rename(tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    config = configs.replace(small, {"init_from": "weights.safetensors", "name": ""})

    def stop() -> None:
        raise RuntimeError("a crash")

    first = Trainer(config, callbacks=[AtStep(4, stop)])
    with pytest.raises(RuntimeError, match="a crash"):
        first.fit()
    path.unlink()
    folder = find_resumable(config)
    assert folder is not None and folder.absolute() == first.run_dir
    assert find_resumable(configs.replace(config, {"init_from": "others.pt"})) is None

    resumed = Trainer(configs.replace(config, {"init_from": "others.pt", "init_partial": True}), resume=first.run_dir)
    note = f"init_from {tmp_path}/others.pt is not read: the run goes on from its checkpoint"
    assert note in startup_summary(resumed._parts)
    resumed.fit()
    stored = configs.load(first.run_dir / "config.json")
    assert (stored.init_from, stored.init_partial) == (str(path), False)
    assert stored.init_sha256 == first.config.init_sha256 != ""
    lineage = {"init_from": str(path), "sha256": stored.init_sha256}
    assert json.loads((first.run_dir / "encoder.json").read_text())["lineage"] == lineage


@pytest.mark.parametrize(
    ("encoder", "is_pretrained", "package"),
    [("resnet18", True, "torchvision"), ("timm/resnet18", True, "timm"), ("resnet18", False, "")],
)
def test_configuration_of_an_earlier_version_keeps_its_weights(encoder: str, is_pretrained: bool, package: str) -> None:
    values = configs.to_dict(configs.replace(Config(), {"model.encoder": encoder}))
    for name in ("init_from", "init_partial", "init_sha256"):
        del values[name]
    values["model"]["pretrained"] = is_pretrained
    expected = configs.replace(Config(), {"model.encoder": encoder, "init_from": package})
    assert configs.from_dict(values) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_partial": True}, "init_partial must be False without init_from"),
        ({"init_sha256": "0" * 64}, "init_sha256 must be empty without init_from"),
        ({"init_from": "x.pt", "init_sha256": "0" * 63}, "init_sha256 must be 64 hexadecimal digits"),
    ],
)
def test_options_that_say_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.replace(Config(), changes)
