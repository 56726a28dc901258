"""Errors in the order of their cost: before torch is imported, before images are scanned, before networks are built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from byol_fast import config as configs
from byol_fast import pretrain
from byol_fast.config import Config, encoder_names, recipes
from byol_fast.models import encoders
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint_files

COMMANDS = "demo", "train", "eval knn", "embed", "export", "profile", "bench", "doctor", "preview", "roofline", "report"
RECIPE = ("train", "imagenet_resnet50")
EXTEND = ("train", "--extend")
ERRORS: dict[tuple[str, ...], str] = {
    (*RECIPE, "nowhere"): "data.root: {cwd}/nowhere does not exist; give a folder",
    (*RECIPE, "--data.root", "nowhere"): "data.root: {cwd}/nowhere does not exist; give a folder",
    (*RECIPE, "photos", "--knn.val-root", "nowhere"): "knn.val_root: {cwd}/nowhere does not exist",
    (*RECIPE, "empty"): "data.root: no images in {cwd}/empty or below (only 1 x .md)",
    (*RECIPE, "photos.zip"): "photos.zip is a file of an unknown kind; unpack it first",
    (*RECIPE, "train-{{0..3}}.tar"): "data.root: 4 of 4 shards of train-{{0..3}}.tar do not exist",
    (*RECIPE, "photos/0.jpg"): "0.jpg is a single image; give the folder that holds",
    RECIPE: "data.root must be set",
    (*RECIPE, "photos", "--model.encoder", "resnet51"): "got 'resnet51'; did you mean resnet50, resnet18, resnet152?",
    (
        *RECIPE,
        "photos",
        "--init-from",
        "torchvison",
    ): "init_from is torchvison, which does not exist (the current folder is {cwd}); did you mean 'torchvision'?",
    (*RECIPE, "photos", "--init-from", "good"): "init_from is good, which does not exist (did you mean runs/good?)",
    (
        *RECIPE,
        "photos",
        "--init-from",
        "photos",
    ): "a folder without checkpoints and without encoder.safetensors",
    (*RECIPE, "photos", "--init-from", "photos/0.jpg"): "init_from must be a file whose name ends in .safetensors, .pt",
    (*RECIPE, "photos", "--init-from", "timm"): "init_from must be 'torchvision' or a path with encoder 'resnet50'",
    (*RECIPE, "photos", "--init-partial"): "init_partial must be False without init_from, got True; name the weights",
    (*RECIPE, "photos", "--init-from", "timm", "--model.encoder", "resnet18_narrow"): "init_from must be a path with",
    (*RECIPE, "photos", "--name", "good"): "good must be a new run's folder, it is not empty; continue it",
    (*RECIPE, "photos", "--optim.lrr", "1"): "--optim.lr",
    (*RECIPE, "photos", "--optim.lr", "-1"): "optim.lr must be a number",
    (*RECIPE, "photos", "photos"): "FOLDER must be one path, got 2: photos photos",
    (*RECIPE, "photos", "--data.root", "photos"): "FOLDER must not be given beside --data.root, got photos",
    (*RECIPE, "photos", "--image-size", "8", "--view2.size=8"): "--image-size must not be given beside --view2.size",
    (*RECIPE, "photos", "--image-size", "0"): "image_size must be an integer from 1 to 8,192, got 0",
    ("train", "imagenet_resnet51"): "did you mean 'imagenet_resnet50'?",
    ("train", "photos"): "photos is not a recipe; it comes first: byol-fast train RECIPE photos",
    ("preview", "photos"): "photos is not a recipe; it comes first: byol-fast preview RECIPE photos",
    ("profile", "photos", "--steps", "3"): "photos is not a recipe; it comes first: byol-fast profile RECIPE photos",
    ("roofline", "photos"): "photos is not a recipe; it comes first: byol-fast roofline RECIPE",
    ("train", "--resume", "runs/good", "--optim.lr", "3"): "optim.lr was 0.45 and is 3.0; drop these options",
    (*RECIPE, "photos", "--resume", "auto", "--name", "good"): "must be continued as it was started, but",
    ("train", "--resume", "photos"): "photos/config.json does not exist; give the run folder",
    ("train", "--resume", "runs/lost"): "must hold the checkpoints that this run has saved, it holds none",
    (*EXTEND, "done", "nowhere", "--epochs", "4"): "nowhere is neither a recipe nor an existing folder",
    (*EXTEND, "done", "--epochs", "4", "nowhere"): "train --extend runs/done FOLDER --epochs N",
    (*EXTEND, "done"): "epochs or steps must be given, runs/done has done 30 steps (3 epochs); give the new total",
    (*EXTEND, "done", "--epochs", "3"): "epochs must be the total, above what runs/done has done, 30 steps (3 epochs)",
    (*EXTEND, "done", "--steps", "30"): "steps must be the total, above what runs/done has done, 30 steps (3 epochs)",
    (*EXTEND, "done", "--epochs", "4", "--resume", "auto"): "--extend must not be given beside --resume",
    (*EXTEND, "done", "--epochs", "4", "--seed", "3"): "as it was started, but seed was 0 and is 3; drop these options",
    (*EXTEND, "done", "--epochs", "4", "--name", "done"): "done must be a new run's folder, it is not empty",
    (*EXTEND, "cut", "--epochs", "4"): "must hold the checkpoint of the last step, 30, it holds those of steps 20; put",
    (*EXTEND, "good", "--epochs", "4"): "train --resume runs/good`",
    ("train", "--extend", "photos", "--epochs", "4"): "photos/config.json does not exist; give the run folder",
    ("train", "--extend", "--epochs", "4"): "--extend must be followed by a run folder",
    (*RECIPE, "photos", "--extended-at", "4"): "extended_at must be above 0 with extend, and 0 without, got 4; use",
    ("profile", "imagenet_resnet50", "nowhere"): "nowhere does not exist",
    ("profile", "--resume", "runs/good", "--optim.lr", "3"): "optim.lr was 0.45 and is 3.0",
    ("preview", "imagenet_resnet50", "nowhere"): "nowhere does not exist",
    ("preview", "imagenet_resnet50", "photos", "--output", "x.jpg"): "output must be a file that ends in .png",
    ("roofline", "imagenet_resnet50", "--model.encoder", "resnet51"): "did you mean resnet50",
    ("roofline", "imagenet_resnet50", "--gpu", "H1000"): "gpu must be one of A100, H100, H200, RTX 4090, got 'H1000'",
    ("doctor", "nowhere"): "nowhere does not exist",
    ("embed", "nowhere", "photos"): "nowhere does not exist (the current folder is {cwd}); give a run folder",
    ("embed", "good", "photos"): "good does not exist (did you mean runs/good?); give a run folder",
    ("train", "--resume", "nowhere"): "nowhere/config.json does not exist (the current folder is {cwd}); give the run",
    ("embed", "runs/good", "nowhere"): "folder: {cwd}/nowhere does not exist",
    ("embed", "runs/good", "photos", "--output", "x.csv"): "output must be a file that ends in .npz or .parquet",
    ("eval", "knn", "nowhere"): "nowhere does not exist",
    ("eval", "knn", "runs/good", "--train", "nowhere"): "--train: {cwd}/nowhere does not exist",
    ("export", "good"): "good/config.json does not exist (did you mean runs/good?); give the run folder",
    ("bench", "cifar10", "cifar10_fst"): "did you mean 'cifar10_fast'?",
    ("bench", "cifar10", "photos"): "it comes first: byol-fast bench cifar10 RECIPE --data.root photos",
    ("bench", "cifar10", "--seeds", "2", "demo"): "recipes must come before the options, and images are given by",
    ("bench", "cifar10", "--knn.enabled", "off"): "--knn.enabled must not be given, this command sets it",
    ("bench", "cifar10", "--seeds", "0"): "--seeds must be an integer from 1 to 1,000, got 0",
    ("bench", "cifar10", "--minutes", "-1"): "--minutes must be a number from 0 to 1e+06, got -1",
    ("bench", "cifar10", "--minutes", "5", "--epochs", "2"): "--minutes must not be given beside --epochs",
    ("bench", "cifar10", "--steps", "5"): "--steps must not be given, this command sets it; use --epochs",
    ("bench", "cifar10", "--data.root", "nowhere"): "data.root: {cwd}/nowhere does not exist; give a folder",
    ("bench", "cifar10", "cifar10_fast", "cifar10_fast"): "must be named once, got cifar10_fast 2 times",
    ("report",): "usage: byol-fast report RUN [RUN ...]",
    ("report", "--num", "3"): "byol-fast report: a run folder is missing",
    ("report", "nowhere"): "nowhere does not exist (the current folder is {cwd}); give a run folder",
    ("report", "photos"): "photos must be a run folder",
}
"""Command lines and what their message says, with the current folder for {cwd}."""
SCRIPT = """
import contextlib, io, json, sys
import byol_fast
from byol_fast.cli.main import main
results = []
try:
    byol_fast.pretrain("nowhere")
except ValueError as error:
    results.append((2, str(error), "torch" in sys.modules))
for argv in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            main(argv)
        except SystemExit as ended:
            code = ended.code
    results.append((code, shown.getvalue(), "torch" in sys.modules))
print(json.dumps(results))
"""


def write_files(folder: Path) -> None:
    """Images, and run folders: unfinished, without its checkpoints, finished, and finished without its last one."""
    (folder / "photos").mkdir()
    (folder / "photos" / "0.jpg").touch()
    (folder / "photos.zip").touch()
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.md").touch()
    config = configs.replace(recipes.get("imagenet_resnet50_100"), {"data.root": folder / "photos"})
    for name, steps in {"good": (1,), "lost": (), "done": (20, 30), "cut": (20,)}.items():
        run = folder / "runs" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(configs.to_dict(config)))
        (run / "status.json").write_text(json.dumps({"finished": name in {"done", "cut"}}))
        for step in steps:
            checkpoint_files.path_at_step(run / "checkpoints", step).touch()
        if name in {"done", "cut"}:
            (run / "metrics.jsonl").write_text('{"step": 29, "epoch": 2.9}\n{"step": 30, "epoch": 3.0}\n')


def test_help_and_early_errors_import_no_torch(tmp_path: Path) -> None:
    write_files(tmp_path)
    helps = [[*command.split(), "--help"] for command in COMMANDS]
    helps += [[command, "demo", "--help"] for command in ("train", "profile", "preview", "roofline")]
    lines = [*helps, *([word.format() for word in words] for words in ERRORS)]
    command, words = [sys.executable, "-c", SCRIPT], json.dumps(lines)
    ended = subprocess.run(command, input=words, capture_output=True, text=True, cwd=tmp_path, check=True)
    results = json.loads(ended.stdout)
    lines.insert(0, ["pretrain"])
    expected = [(2, f"data: {tmp_path}/nowhere does not exist")] + [(0, "")] * len(helps)
    expected += [(2, text.format(cwd=tmp_path)) for text in ERRORS.values()]
    for line, (code, text), (got_code, shown, has_torch) in zip(lines, expected, results, strict=True):
        assert got_code == code, (line, shown)
        assert text in " ".join(shown.split()), line
        assert "Traceback" not in shown, line
        assert not has_torch, f"{line} imports torch"


def test_listed_names_are_those_of_torchvision() -> None:
    version = tuple(map(int, torchvision.__version__.split(".")[:2]))
    installed = torchvision.models.list_models(module=torchvision.models)
    if version <= encoder_names.TORCHVISION_VERSION:
        assert list(encoder_names.TORCHVISION) == installed
    else:  # add the new ones to the list
        assert set(encoder_names.TORCHVISION) <= set(installed)
    assert set(encoder_names.OWN) == set(encoders.OWN_ENCODERS)


@pytest.mark.parametrize(
    ("version", "is_refused"), [("0.26.0", True), ("0.29.2+cu132", True), ("0.30.0", False), ("1.0", False)]
)
def test_newer_torchvision_decides_by_its_own_list(
    version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"torchvision": version}[name])
    if is_refused:
        with pytest.raises(configs.ConfigError, match="got 'resnet9000'"):
            encoder_names.check_encoder_name("resnet9000")
    else:
        encoder_names.check_encoder_name("resnet9000")
    encoder_names.check_encoder_name("resnet50")


@pytest.mark.peers
def test_misspelt_timm_name_gets_the_closest_ones() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    encoders.check_encoder_name("timm/resnet50")
    with pytest.raises(configs.ConfigError, match=r"a timm model, got 'timm/resnet51'; did you mean .*timm/resnet50,"):
        encoders.check_encoder_name("timm/resnet51")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    changes: dict[str, Any] = {"name": "it", "out": tmp_path / "runs", "device": "cpu", "data.threads": 1}
    return configs.replace(recipes.get("cifar10_resnet18"), changes)


def test_unknown_encoder_is_found_before_images_are_scanned(config: Config, tmp_path: Path) -> None:
    for part in ("train_a", "val_a"):  # the scan refuses these folders
        (tmp_path / "images" / part).mkdir(parents=True)
        (tmp_path / "images" / part / "0.jpg").touch()
    changes = {"model.encoder": "resnet51", "data.root": tmp_path / "images"}
    with pytest.raises(ValueError, match="got 'resnet51'; did you mean"):
        Trainer(configs.replace(config, changes))
    with pytest.raises(ValueError, match="it is not clear which to train on"):
        Trainer(configs.replace(config, changes | {"model.encoder": "resnet18"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "batch_size: must be at most the number of training images, 8, got 9"),
        ({"num_images": 1}, "data: there must be 2 or more training images, got 1; add images"),
        ({"optim.warmup_steps": 9, "steps": 8}, "optim.warmup_steps must be at most the run's 8 steps, got 9"),
        ({"probe.enabled": "on"}, "probe.enabled is 'on', but the training images have no labels"),
        ({"knn.enabled": "on"}, "knn.enabled is 'on', but there are no validation images"),
        ({}, "cifar_stem is for torchvision's ResNets, got 'mobilenet_v3_small'"),
    ],
)
def test_number_and_labels_of_images_are_checked_before_networks_are_built(
    changes: dict[str, Any], message: str, config: Config
) -> None:
    """The network cannot be built, which is the last of these errors."""
    changes = dict(changes)
    images = np.zeros((changes.pop("num_images", 8), 32, 32, 3), np.uint8)
    config = configs.replace(config, {"model.encoder": "mobilenet_v3_small", "batch_size": 4})
    with pytest.raises(ValueError, match=message):
        Trainer(configs.replace(config, changes), data=images)


@pytest.mark.parametrize("overrides", [{"view1": {"size": 8}}, {"view2.size": 8}])
def test_image_size_of_pretrain_is_refused_beside_a_view_size(overrides: dict[str, Any]) -> None:
    with pytest.raises(configs.ConfigError, match=r"image_size must not be given beside the size of view[12]"):
        pretrain("nowhere", "demo", image_size=16, **overrides)


@pytest.mark.parametrize("overrides", [{"data": "photos"}, {"data": {"root": "photos"}}, {"data.root": "photos"}])
def test_images_of_pretrain_given_twice_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(configs.ConfigError, match=r"images must be given once, got the first argument and data"):
        pretrain("nowhere", "demo", **overrides)
