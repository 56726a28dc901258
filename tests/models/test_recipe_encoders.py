"""Recipes with other encoders than their own: options of ResNets are dropped, or refused if the user set them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

import byol_fast
from byol_fast import config as configs
from byol_fast.cli.options import parse_config
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.config.resnets import RESNET_OPTIONS, is_resnet
from byol_fast.models.builder import build_model
from byol_fast.models.encoders import build_encoder, create_timm_model

SMALL = ["--view1.size", "32", "--view2.size", "32", "--model.hidden-dim", "16"]
ENCODERS = [
    "vit_b_16",
    "mobilenet_v3_small",
    *(pytest.param(f"timm/{name}", marks=pytest.mark.peers) for name in ("resnet18", "vit_tiny_patch16_224")),
    pytest.param("timm/efficientnet_b0", marks=pytest.mark.peers),
]


def test_resnets_are_those_of_torchvisions_module() -> None:
    names = models.list_models(module=models)
    expected = {name for name in names if models.get_model_builder(name).__module__ == "torchvision.models.resnet"}
    assert {name for name in names if is_resnet(name)} == expected
    assert not is_resnet("timm/resnet18")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_recipe_takes_another_encoder(encoder: str) -> None:
    if encoder.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    built = []
    for name, recipe in recipes.RECIPES.items():
        base = recipe()
        config = parse_config(base, ["--model.encoder", encoder, *SMALL], name)
        dropped = [option for option in RESNET_OPTIONS if getattr(base.model, option)]
        assert recipes.dropped_resnet_options(config) == dropped
        assert configs.differences(base, config).keys() >= {f"model.{option}" for option in dropped}
        if (config.method, config.model) not in built:
            built.append((config.method, config.model))
            with torch.device("meta"):
                build_model(config)
    assert len(built) > 4


@pytest.mark.parametrize("encoder", ["resnext50_32x4d", "wide_resnet50_2", "resnet18_narrow", "resnet18_lightly"])
def test_options_of_a_recipe_stay_for_another_resnet(encoder: str) -> None:
    for name, options in (("imagenet_resnet50", "zero_init_residual"), ("cifar10_resnet18", "cifar_stem")):
        config = parse_config(recipes.get(name), ["--model.encoder", encoder], name)
        assert getattr(config.model, options) and not recipes.dropped_resnet_options(config)
        with torch.device("meta"):
            build_encoder(encoder, cifar_stem=config.model.cifar_stem, zero_init_residual=not config.model.cifar_stem)


def test_configuration_of_lightlys_resnet_has_its_stem() -> None:
    """In every recipe: what it computes has one digest, and the run's files tell the truth."""
    for name in ("imagenet_resnet50", "cifar10_resnet18"):
        assert parse_config(recipes.get(name), ["--model.encoder", "resnet18_lightly"], name).model.cifar_stem


@pytest.mark.parametrize("encoder", ["timm/resnet18", "vit_b_16", "mobilenet_v3_small"])
@pytest.mark.parametrize("option", RESNET_OPTIONS)
def test_option_of_the_user_is_refused(encoder: str, option: str) -> None:
    message = f"model.{option} must be False with the encoder '{encoder}', got True; .* leave it out"
    for recipe in ("imagenet_resnet50_100", "cifar10_resnet18"):
        for word in (f"--model.{option}", f"--model.{option}".replace("_", "-")):
            with pytest.raises(ConfigError, match=message):
                parse_config(recipes.get(recipe), ["--model.encoder", encoder, word], "x")
        given: dict[str, Any] = {"encoder": encoder, option: True}
        for overrides in ({"model": given}, {f"model.{name}": value for name, value in given.items()}):
            with pytest.raises(ConfigError, match=message):
                byol_fast.pretrain("nowhere", recipe, **overrides)
    message = f"build_encoder: {option} is for torchvision's ResNets, got '{encoder}'; drop it"
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_encoder(encoder, **{option: True})


def test_option_that_was_switched_off_is_accepted() -> None:
    words = ["--model.encoder", "vit_b_16", "--model.no-zero-init-residual"]
    assert not parse_config(recipes.get("imagenet_resnet50"), words, "x").model.zero_init_residual


def test_run_notes_the_dropped_option(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = configs.replace(tiny, {"steps": 1, "knn.enabled": "off", "probe.enabled": "off"})
    result = byol_fast.pretrain(None, small, model={"encoder": "mobilenet_v3_small"})
    note = "cifar_stem of the recipe cifar10_resnet18 left out: only for torchvision's ResNets"
    printed = " ".join(capsys.readouterr().out.split())
    assert note in printed
    stored = configs.load(result.run_dir / "config.json")
    assert (stored.model.encoder, stored.model.cifar_stem) == ("mobilenet_v3_small", False)


def test_run_of_an_earlier_version_is_continued() -> None:
    """It stored `zero_init_residual` for encoders that have no residual blocks of a ResNet, and `tensorboard`."""
    values = configs.to_dict(recipes.get("imagenet_resnet50"))
    values["model"]["encoder"] = "vit_b_16"
    del values["log"]
    for tensorboard, log in ((True, ("tensorboard",)), (False, ())):
        config = configs.from_dict(values | {"tensorboard": tensorboard})
        assert not config.model.zero_init_residual and config.log == log
        assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.peers
def test_timm_names_have_their_tags_and_sizes() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    network, arguments = create_timm_model("deit_tiny_patch16_224.fb_in1k", 32)
    assert arguments == {"num_classes": 0, "img_size": 32}
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 192)
    assert create_timm_model("resnet18", 32)[1] == {"num_classes": 0}
    with pytest.raises(ValueError, match=r"'resnet18.none' .* failed with: Invalid pretrained tag"):
        create_timm_model("resnet18.none", 32)
