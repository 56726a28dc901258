"""The end of a run in the terminal: what is printed works as printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import byol_fast
from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, recipes
from byol_fast.models import encoders
from byol_fast.report import callback
from byol_fast.report.callback import ReportCallback
from byol_fast.training import trainer
from byol_fast.training.run_dir import RunDir
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint_files
from byol_fast.utils.commands import program, short_path
from tests.networks import SmallResidualNetwork
from tests.training.helpers import SMALL_RUN


@pytest.fixture
def start(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`byol-fast COMMAND` in the folder of `runs`; the recipe `spec` trains on 60 images in a folder with a space."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encoders.OWN_ENCODERS, "small", lambda **_: SmallResidualNetwork())
    assert tiny.data.root is not None
    images = Path("my images") / "photos.npz"
    images.parent.mkdir()
    tiny.data.root.rename(images)
    small = configs.replace(tiny, SMALL_RUN | {"steps": 6, "data.root": images, "out": Path("runs")})
    monkeypatch.setitem(recipes.RECIPES, "spec", lambda: small)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main.main(arguments)
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    return run


@pytest.mark.parametrize("skips", [False, True], ids=["", "skip corrupt images"])
def test_printed_commands_and_python_lines_work(
    skips: bool, start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("train", "spec", *(["--data.on-corrupt", "skip"] if skips else [])) == 0
    end = capsys.readouterr().out.split("step 6/6")[1].splitlines()[1:]
    assert len(end) <= 12
    assert re.fullmatch(r"done in \d+ s: 6 steps, 72 images, [\d.,]+ images per second", end[0])
    assert end[1] == "files in runs/tiny: encoder.safetensors, encoder.json, report.html, metrics.jsonl"
    assert all((Path("runs/tiny") / name).exists() for name in end[1].partition(": ")[2].split(", "))

    commands = [shlex.split(line.removeprefix(f"  {program()} ")) for line in end if line.startswith(f"  {program()}")]
    assert [words[0] for words in commands] == ["embed", "eval", "export"]
    assert ["skip" in words for words in commands] == [skips, skips, False]
    assert any('on_corrupt="skip"' in line for line in end) == skips
    assert start(*commands[0]) == 0
    for words in commands:  # the parser refuses only the option that is added
        assert start(*words, "--no-such-option") == 2
        refused = re.search(r"Unrecognized options?: ([^\n│]*)", capsys.readouterr().err)
        assert refused is not None and refused[1].strip() == "--no-such-option"

    variables: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in end[end.index("or in Python:") + 1 :]), variables)
    assert np.array_equal(variables["features"], np.load("features.npz")["features"])


def test_end_names_accuracy_before_and_after(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start("train", "spec", "--knn.val-root", "my images/photos.npz", "--knn.k", "1") == 0
    shown = capsys.readouterr().out
    # Each validation image is its own neighbor.
    assert "kNN-1 top-1 accuracy: 100.0% untrained, 100.0% trained" in shown
    assert f"  {program()} eval linear runs/tiny\n" in shown


def test_resume_takes_the_name_of_a_run_and_the_folder_of_moved_images(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("train", "spec") == 0
    capsys.readouterr()
    assert start("train", "--resume", "tiny") == 0
    assert "already complete: 6 steps, 72 images" in capsys.readouterr().out
    checkpoint_files.path_at_step(Path("runs/tiny/checkpoints"), 6).unlink()
    assert start("train", "--resume", "tiny") == 0
    assert re.search(r"\ndone in \d+ s after step \d; in all: 6 steps, 72 images", capsys.readouterr().out)
    moved = Path("my images/photos.npz").rename("moved.npz")
    for words in (["moved.npz", "--resume", "tiny"], ["--resume", "tiny", "moved.npz"]):
        assert start("train", *words) == 0
        assert configs.load(Path("runs/tiny/config.json")).data.root == moved.absolute()
    Path("runs").rename("other")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for arguments in (["--out", "other"], ["--out=other"], ["--out=~/other"]):
        assert start("train", "--resume", "tiny", *arguments) == 0
    Path("tiny").mkdir()  # of images, perhaps
    assert start("train", "--resume", "tiny", "--out", "other") == 0
    assert start("train", "--resume", "~/other/tiny") == 0
    assert start("train", "fotos", "--resume", "tiny", "--out", "other") == 2
    assert "fotos is neither a recipe nor an existing folder" in capsys.readouterr().err
    moved.unlink()
    assert start("train", "--resume", "tiny", "--out", "other") == 2
    hint = f"; if the images were moved, give their new folder: {program()} train --resume other/tiny FOLDER\n"
    assert capsys.readouterr().err.endswith(hint)


def test_complete_run_without_checkpoints_is_not_trained_again(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("train", "spec") == 0
    done = capsys.readouterr().out.partition("done in ")[2].partition(": ")[2]
    shutil.rmtree("runs/tiny/checkpoints")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    for arguments in (["--resume", "tiny"], ["spec", "--resume", "auto"]):
        assert start("train", *arguments) == 0
        assert capsys.readouterr().out == f"already complete: {done}"
        assert start("train", *arguments, "--optim.lr", "3") == 2
        assert "must be continued as it was started" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    Path("runs/tiny/encoder.safetensors").unlink()
    for arguments in (["--resume", "tiny"], ["spec", "--resume", "auto"]):
        assert start("train", *arguments) == 2
        assert "must hold the checkpoints that this run has saved, it holds none" in capsys.readouterr().err


def test_interrupted_run_leaves_a_report_and_says_how_to_go_on(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(callback: ReportCallback, trainer: Trainer, records: object) -> None:
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ReportCallback, "on_log", interrupt)
    assert start("train", "spec") == 130
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines == [
        f"SIGINT: saved after step 2; go on with: {program()} train --resume runs/tiny",
        "report so far: runs/tiny/report.html",
    ]
    assert "2 of 6 steps" in Path("runs/tiny/report.html").read_text()
    assert start(*lines[0].partition(f"{program()} ")[2].split()) == 0
    assert byol_fast.evaluate.embed_folder("runs/tiny", "my images/photos.npz").features.shape[0] == 60


@pytest.mark.parametrize(
    ("signals", "code", "end"),
    [
        ({"report": 1}, 0, "SIGINT: the run is ending, its last files are being written; Ctrl-C again ends at once"),
        ({"last": 1}, 0, "SIGINT: the run is ending, its last files are being written; Ctrl-C again ends at once"),
        (
            {"report": 2},
            130,
            "SIGINT: the run is complete and its encoder saved; report with: {program} report runs/tiny",
        ),
        ({"export": 2}, 130, "SIGINT: saved after step 6; go on with: {program} train --resume runs/tiny"),
        (
            {"step": 1, "report": 1},
            130,
            "SIGINT: saved after step 2; go on with: {program} train --resume runs/tiny",
        ),
    ],
)
def test_signal_at_the_end_stops_nothing_and_a_further_one_ends_at_once(
    start: Callable[..., int],
    signals: dict[str, int],
    code: int,
    end: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(phase: str) -> None:
        for _ in range(signals.get(phase, 0)):
            signal.raise_signal(signal.SIGINT)

    def after(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*args: Any, **kwargs: Any) -> Any:
            interrupt(phase)
            return function(*args, **kwargs)

        return interrupted

    def on_log(callback: ReportCallback, trainer: Trainer, records: object) -> None:
        if trainer.state.step in {2, 6}:
            interrupt("step" if trainer.state.step == 2 else "last")

    monkeypatch.setattr(ReportCallback, "on_log", on_log)
    monkeypatch.setattr(callback, "report", after("report", vars(callback)["report"]))
    monkeypatch.setattr(trainer, "export_encoder", after("export", vars(trainer)["export_encoder"]))
    assert start("train", "spec") == code
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-1] == end.format(program=program())
    is_complete, run = "export" not in signals and "step" not in signals, RunDir(Path("runs/tiny"))
    assert (run.is_finished(), (run.path / "encoder.safetensors").exists()) == (is_complete, is_complete)
    assert (run.path / "report.html").exists() is ("done in" in shown.out) is (code == 0)


def test_program_alone_says_where_to_start(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start() == 2
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert [line.split()[1] for line in shown[1:]] == ["demo", "train", "--help"]


def test_commands_are_as_the_shell_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "my venv" / "python"))
    assert program() == "'my venv/python' -m byol_fast"
    (tmp_path / "byol-fast").touch(mode=0o755)
    assert program() == "byol-fast"
    assert [short_path(path) for path in (tmp_path / "a" / "b", "a", "/")] == ["a/b", "a", "/"]
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    assert [short_path(path) for path in (tmp_path / "a", "a")] == [str(tmp_path / "a"), "a"]


@pytest.mark.slow
def test_demo_prints_accuracies_of_pixels_untrained_and_trained(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "1", "--model.encoder", "small", "--device", "cpu", "--precision", "fp32", "--name", "d"]
    assert start("demo", *options) == 0
    shown = capsys.readouterr().out
    rows = [re.findall(r"[\d.]+%", line) for line in shown.splitlines() if line.startswith("│")]
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows[0][0] == "83.1%"
    accuracies = re.search(r"kNN-20 top-1 accuracy: ([\d.]+%) untrained, ([\d.]+%) trained", shown)
    assert accuracies is not None and [rows[1][0], rows[2][0]] == list(accuracies.groups())
    assert f"{program()} train imagenet_resnet50_100 path/to/images" in shown
