"""The command line: exit codes, messages, options, and the path from training to an exported encoder."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.cli import main, options, report, train
from byol_fast.config import Config, recipes
from byol_fast.utils import checkpoint as checkpoints

SMALL = [
    *("--view1.size", "16", "--view2.size", "16", "--batch-size", "12", "--steps", "4", "--log-every", "2"),
    *("--model.encoder", "resnet18_narrow", "--model.hidden-dim", "32", "--model.projection-dim", "16"),
    *("--device", "cpu", "--data.threads", "1", "--name", "it", "--no-memory-check"),
]


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_train_resume_and_export(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training runs in a process of its own, as a user starts it; the other commands run in this one."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "byol_fast", "train", "cifar10_resnet18", "--data.root", str(npz), *SMALL]
    trained = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "it"
    assert f"run folder: {run}\n" in trained.stdout
    assert "step 4/4" in trained.stdout
    assert checkpoints.saved_steps(run / "checkpoints") == [4]

    assert exit_code("train", "--resume", "runs/it") == 0
    assert exit_code("train", "--resume", "runs/it", "--optim.lr", "3") == 2
    assert "optim.lr was 1.0 and is 3.0" in capsys.readouterr().err
    assert exit_code("train", "cifar10_resnet18", "--resume", "auto", "--data.root", str(npz), *SMALL) == 0
    assert "already complete at step 4 of 4" in capsys.readouterr().out

    assert exit_code("export", "runs/it", "--output", "out") == 0
    assert capsys.readouterr().out.split() == ["out/encoder.safetensors", "out/encoder.json"]
    assert (tmp_path / "out" / "encoder.safetensors").read_bytes() == (run / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "cifar_resnet18"], "did you mean 'cifar10_resnet18'"),
        (["train"], "a recipe is missing"),
        (["train", "cifar10_resnet18", "--optim.lr", "-1"], "optim.lr must be a number from 1e-12 to 10000, got"),
        (["train", "demo", "--model.projection-dim", "2147483648"], "must be an integer from 1 to 65,536, got"),
        (["profile", "demo", "--steps", "²"], "--steps must be an integer, got '²'"),
        (["train", "cifar10_resnet18", "--optim.weight-decy", "1"], "--optim.weight-decay"),
        (["train", "--resume"], "--resume must be followed by a run folder"),
        (["train", "--resume", "nowhere"], "nowhere/config.json does not exist"),
        (["train", "imagenet_resnet50", "--data.root", "nowhere"], "nowhere"),
        (["train", "imagenet_resnet50", "--data.root", "~nouser/images"], "~nouser/images does not exist"),
        (["train", "imagenet_resnet50"], "data.root must be set"),
        (["train", "--seed", "1", "demo"], "it comes first: byol-fast train demo"),
        (["train", "/tmp"], "it comes first: byol-fast train RECIPE /tmp"),
        (["export", "nowhere"], "nowhere/config.json does not exist"),
        (["roofline", "demo", "--output", "/dev/null/x"], "roofline: /dev/null/x cannot be written"),
        (["train", "demo", "--name", "a" * 300], "cannot be created (File name too long); set a shorter `name` or"),
        (["train", "demo", "--resume", "auto", "--name", "ü" * 128], "File name too long"),
        (["train", "demo", "--name", "a\nb"], r"name must have no control characters, got 'a\nb'; choose another"),
        (["train", "demo", "--out", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["demo", "--out", "/dev/null"], "Not a directory: '/dev/null'); make it writable, or set `out` to another"),
        (["embed", "a" * 300, "x"], "File name too long"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_error_in_a_process_has_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "byol_fast", "train", "imagenet_resnet50", "--data.root", "nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)
    assert ended.returncode == 2
    assert "nowhere does not exist" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50)])
def test_failed_allocation_is_a_message(
    allocate: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("byol_fast.cli.doctor.main", lambda argv: allocate())
    assert exit_code("doctor") == 1
    assert "out of memory: " in capsys.readouterr().err


def test_error_of_the_operating_system_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr(report, "main", fail)
    assert exit_code("report", "run") == 1
    message = "[Errno 28] No space left on device: 'report.html'\n(set BYOL_FAST_TRACEBACK=1 for the traceback)\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("columns", ["60", "120"])
def test_help_shows_every_field_with_the_recipe_value(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert exit_code("train", "cifar10_resnet18", "--help") == 0
    shown = capsys.readouterr().out
    names = [f"--{name.replace('_', '-')}" for name in flat(configs.to_dict(Config()))]
    assert sorted(re.findall(r"^  (--\S+?),? ?(?: .*)?$", shown, re.MULTILINE)) == sorted([*names, "--image-size"])
    first = shown.partition("changed most often:")[2].partition("options:")[0]
    assert [name for name in names if f"  {name}" in first] != [] and first.count("\n  --") == 9
    # Whole words, also where a line of the source ends.
    words = " ".join(shown.split())
    assert "learning rate scales with batch_size * grad_accum_steps * processes. (default: 1)" in words
    assert "LARS trust coefficient. (default: 0.02)" in words
    assert "fastest (torch.backends.cudnn.benchmark). (default: False)" in words
    assert max(len(line) for line in shown.splitlines() if not line.startswith(("  -", "usage"))) <= int(columns)


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields of a configuration."""
    return [
        name
        for key, value in values.items()
        for name in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


def test_help_without_a_recipe_shows_options_without_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.index("recipes:") < shown.index("changed most often:") < shown.index("--optim.trust-coefficient FLOAT")
    assert "(default:" not in shown


@pytest.mark.parametrize("value", ["runs/x", "auto"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
@pytest.mark.parametrize("option", ["--resume", "--extend"])
def test_run_is_split_from_the_options(option: str, form: str, value: str) -> None:
    words = ["cifar10_resnet18", *form.format(option, value).split(), "--seed", "3"]
    assert train.take_run(option, words) == (value, ["cifar10_resnet18", "--seed", "3"])


def test_options_set_their_fields() -> None:
    config = options.parse_config(recipes.demo(), ["--optim.warmup_steps", "6", "--view1.scale", "0.5", "1"], "x")
    assert config == configs.replace(recipes.demo(), {"optim.warmup_steps": 6, "view1.scale": (0.5, 1.0)})


@pytest.mark.parametrize("words", ["photos --image-size 16 --seed 1", "--seed 1 --image-size=16 photos"])
def test_short_forms_are_stored_as_what_they_stand_for(words: str) -> None:
    changes = {"data.root": Path("photos"), "view1.size": 16, "view2.size": 16, "seed": 1}
    assert options.parse_config(recipes.demo(), words.split(), "x") == configs.replace(recipes.demo(), changes)


@pytest.mark.parametrize("words", ["--image-size 64 {}", "{} --image_size=16 --image-size=64"])
def test_image_size_is_that_of_the_views_that_others_are_checked_against(words: str) -> None:
    """The recipe's views of 24 px are smaller than these local views."""
    words = words.format("--num-local-views 2 --local-view.size 32")
    views = options.parse_config(recipes.demo(), words.split(), "x").view_configs
    assert [view.size for view in views] == [64, 64, 32, 32]
