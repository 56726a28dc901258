from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.export import export_run, load_encoder
from byol_fast.trainer import Trainer


@pytest.mark.parametrize("cifar_stem", [False, True])
def test_exported_resnet_loads_into_plain_torchvision(tiny: Config, cifar_stem: bool) -> None:
    """The lines of the README."""
    trainer = Trainer(configs.replace(tiny, {"steps": 2, "model": {"encoder": "resnet18", "cifar_stem": cifar_stem}}))
    run = trainer.fit().run_dir

    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    if cifar_stem:
        encoder.conv1, encoder.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    encoder.load_state_dict(load_file(run / "encoder.safetensors"))

    x = torch.randn(4, 3, 32, 32)
    trained = trainer.task.encoder
    assert torch.equal(encoder.eval()(x), trained.to(memory_format=torch.contiguous_format).eval()(x))
    ours, about = load_encoder(run)
    assert torch.equal(ours(x), encoder(x))
    assert about == json.loads((run / "encoder.json").read_text())
    assert (about["feature_dim"], about["cifar_stem"], about["step"], about["image_size"]) == (512, cifar_stem, 2, 16)


def test_export_of_a_run_equals_the_encoder_it_wrote(tiny: Config, tmp_path: Path) -> None:
    run = Trainer(configs.replace(tiny, {"steps": 2})).fit().run_dir
    weights, about = export_run(run, tmp_path / "elsewhere")
    first, second = load_file(weights), load_file(run / "encoder.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert about.read_text() == (run / "encoder.json").read_text()


def test_a_run_without_an_export_gives_the_encoder_of_its_newest_checkpoint(tiny: Config) -> None:
    run = Trainer(configs.replace(tiny, {"steps": 2})).fit().run_dir
    exported, about = load_encoder(run)
    (run / "encoder.safetensors").unlink()
    encoder, same = load_encoder(run)
    assert same == about
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(encoder(x), exported(x))


def test_missing_export_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="byol-fast export RUN"):
        load_encoder(tmp_path)
