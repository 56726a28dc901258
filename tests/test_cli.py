"""The command line as a person types it, in a process of its own where that matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from byol_fast import config as configs
from byol_fast.cli import main, options, train
from byol_fast.utils import checkpoint as checkpoints


def byol_fast(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "byol_fast", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
        check=False,
    )


SMALL = [
    *("--view1.size", "16", "--view2.size", "16", "--batch-size", "12", "--steps", "4", "--log-every", "2"),
    *("--model.encoder", "resnet18_narrow", "--model.hidden-dim", "32", "--model.projection-dim", "16"),
    *("--device", "cpu", "--data.threads", "1", "--name", "it"),
]


def test_train_resume_and_export(npz: Path, tmp_path: Path) -> None:
    trained = byol_fast("train", "cifar10_resnet18", "--data.root", str(npz), *SMALL, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "it"
    assert "run folder: runs/it" in trained.stdout
    assert "step 4/4" in trained.stdout
    assert checkpoints.steps_in(run / "checkpoints") == [4]

    again = byol_fast("train", "--resume", "runs/it", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    refused = byol_fast("train", "--resume", "runs/it", "--optim.lr", "3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "optim.lr was 1.0 and is 3.0" in refused.stderr
    automatic = byol_fast(
        "train", "cifar10_resnet18", "--resume", "auto", "--data.root", str(npz), *SMALL, cwd=tmp_path
    )
    assert automatic.returncode == 0, automatic.stderr
    assert "already complete at step 4 of 4" in automatic.stdout

    exported = byol_fast("export", "runs/it", "--output", "out", cwd=tmp_path)
    assert exported.stdout.split() == ["out/encoder.safetensors", "out/encoder.json"]
    assert (tmp_path / "out" / "encoder.safetensors").read_bytes() == (run / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["train", "cifar_resnet18"], 2, "did you mean 'cifar10_resnet18'"),
        (["train"], 2, "a recipe is missing"),
        (["train", "cifar10_resnet18", "--optim.lr", "-1"], 2, "optim.lr must be positive"),
        (["train", "--resume"], 2, "--resume must be followed by a run folder"),
        (["train", "--resume", "nowhere"], 2, "nowhere/config.json does not exist"),
        (["train", "imagenet_resnet50", "--data.root", "nowhere"], 2, "nowhere"),
        (["train", "imagenet_resnet50"], 2, "data.root"),
        (["train", "--seed", "1", "demo"], 2, "it comes first: byol-fast train demo"),
        (["train", "/tmp"], 2, "images are given as --data.root /tmp"),
        (["export", "nowhere"], 2, "nowhere/config.json does not exist"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    ended = byol_fast(*arguments, cwd=tmp_path)
    assert message in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code
    assert not list(tmp_path.iterdir())


def test_unknown_option_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["train", "cifar10_resnet18", "--optim.weight-decy", "1"])
    assert stopped.value.code == 2
    assert "--optim.weight-decay" in capsys.readouterr().err


def test_help_shows_every_field_with_the_recipes_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["train", "cifar10_resnet18", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--data.root", "--view2.solarize_p-p", "--optim.warmup-steps", "--knn.temperature"):
        assert option in shown
    assert "LARS trust coefficient" in shown
    assert "0.02" in shown


@pytest.mark.parametrize("value", ["runs/x", "auto"])
@pytest.mark.parametrize("form", ["--resume {}", "--resume={}"])
def test_resume_is_taken_out_of_the_options(form: str, value: str) -> None:
    words = ["cifar10_resnet18", *form.format(value).split(), "--seed", "3"]
    assert train.take_resume(words) == (value, ["cifar10_resnet18", "--seed", "3"])


def test_an_option_reaches_its_field() -> None:
    from byol_fast.config import recipes

    config = options.parse(recipes.demo(), ["--optim.warmup_steps", "6", "--view1.scale", "0.5", "1"], "x")
    assert config == configs.replace(recipes.demo(), {"optim.warmup_steps": 6, "view1.scale": (0.5, 1.0)})
