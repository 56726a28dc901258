"""Collapse and skipped steps: warnings, results, exit codes, and what an automatic resume does about them."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, recipes
from byol_fast.data import Batch
from byol_fast.training.health import CollapseDetector, assess
from byol_fast.training.metrics_file import read
from byol_fast.training.resume import find_resumable
from byol_fast.training.run_dir import RunDir
from byol_fast.training.trainer import Trainer


def steps(*stds: float | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": 0, "knn_top1": 0.1}]
    return records + [
        {"step": i, "loss": None if std is None else 1.0, "embedding_std": std} for i, std in enumerate(stds, 1)
    ]


@pytest.mark.parametrize(
    ("stds", "batch_size", "std", "problem"),
    [
        ([0.0] * 90 + [0.21] * 10, 64, 0.21, None),
        ([0.9] * 90 + [0.19] * 10, 64, 0.19, "collapsed: the embedding std is 0.19 (1 is healthy"),
        ([0.9] * 90 + [0.0] * 5 + [0.5] * 5, 64, 0.25, None),  # the mean decides
        ([0.9] * 99 + [0.0], 64, 0.81, None),
        ([0.9] * 10 + [0.1], 64, 0.5, None),  # a tenth of eleven steps: two
        ([0.1], 64, 0.1, "collapsed"),
        ([0.15], 2, 0.15, None),  # pairs of normal numbers have a std of 0.56
        ([0.1], 2, 0.1, "collapsed: the embedding std is 0.10 (in batches of 2, 0.56 is healthy"),
        ([None] * 9, 64, math.nan, "every step was skipped"),
        ([0.9] * 9 + [None], 64, math.nan, None),
        ([None] * 9 + [0.9], 64, 0.9, None),
        ([], 64, math.nan, None),
    ],
)
def test_last_tenth_of_the_steps_decides(
    stds: list[float | None], batch_size: int, std: float, problem: str | None
) -> None:
    health = assess(steps(*stds), batch_size=batch_size, method="byol")
    assert health.embedding_std == pytest.approx(std, nan_ok=True)
    assert health.skipped_steps == stds.count(None)
    assert (health.problem is None) if problem is None else (health.problem or "").startswith(problem)


def test_advice_names_options_of_the_method() -> None:
    problems = [assess(steps(0.0), batch_size=64, method=method).problem or "" for method in ("byol", "simsiam")]
    assert ["tau.base" in problem for problem in problems] == [True, False]


def test_collapse_is_reported_when_it_begins_and_again_after_a_recovery() -> None:
    detector = CollapseDetector(total_steps=100, batch_size=64, method="byol")
    # A few low values, values around the bound, values between the bounds, a recovery, another collapse.
    stds = [0.1] * 5 + [0.9] * 20 + [0.05] * 20 + [0.19, 0.21] * 10 + [0.4] * 20 + [0.1] * 20 + [0.8] * 20 + [0.1] * 20
    reported = [r["step"] for r in steps(*stds) if detector.update([r]) is not None]
    # Means of ten steps: (0.9 + 9 * 0.05) / 10 is the first below 0.2; the last begins with (0.8 + 9 * 0.1) / 10.
    assert reported == [25 + 9, 125 + 9]


def test_single_low_batches_and_skipped_steps_are_no_collapse() -> None:
    detector = CollapseDetector(total_steps=10, batch_size=64, method="byol")
    assert detector.update(steps(0.0, *[0.9] * 8, None, None, None, 0.0)) is None
    assert detector.update(steps(None, None)) is None


@pytest.fixture
def black(small: Config, npz: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run that collapses by construction, also as the recipe `black`: all images are equal."""
    np.savez(npz, images=np.zeros((60, 32, 32, 3), np.uint8), labels=np.arange(60) % 3)
    config = configs.replace(small, {"steps": 14})
    monkeypatch.setitem(recipes.RECIPES, "black", lambda: config)
    return config


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours, without those of other libraries."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("byol_fast")]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    return stopped.value.code


def test_collapsed_run_is_saved_and_named_and_not_begun_again(
    black: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    run = black.out / "tiny"
    assert exit_code("train", "black") == 3
    collapse, end = warnings_of(caplog)
    assert collapse.startswith(
        "collapse: the embedding std is 0.00 in the last 10 steps, to step 10 (in batches of 12,"
    )
    assert end.startswith("runs/tiny: collapsed: the embedding std is 0.00")
    assert (run / "encoder.safetensors").exists()
    assert "Collapsed: the embedding std is 0.00" in (run / "report.html").read_text()
    status = json.loads((run / "status.json").read_text())
    assert status == {"finished": True, "problem": end.removeprefix("runs/tiny: ")}

    for has_checkpoints in (True, False):
        if not has_checkpoints:
            shutil.rmtree(run / "checkpoints")
        for name in ("tiny", ""):
            caplog.clear()
            assert exit_code("train", "black", "--resume", "auto", "--name", name) == 0
            assert warnings_of(caplog) == [end]
            assert [p.name for p in black.out.iterdir()] == ["tiny"]
            assert json.loads((run / "status.json").read_text()) == status


def test_automatic_resume_passes_a_collapsed_run_over_behind_a_healthy_one(black: Config) -> None:
    Trainer(black).fit()
    unnamed = configs.replace(black, {"name": ""})
    assert find_resumable(unnamed) == black.out / "tiny"
    assert find_resumable(configs.replace(unnamed, {"seed": 5})) is None
    later = RunDir(Trainer(configs.replace(black, {"name": "later"})).fit().run_dir)
    (later.status).write_text('{"finished": true}')
    assert find_resumable(unnamed) is None


def test_run_of_skipped_steps_ends_with_a_problem(small: Config, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(small)
    step = trainer.train_step.__call__

    def spoiled(batches: list[Batch], number: int) -> Any:
        views = tuple(view.float() * math.nan for view in batches[0].views)
        return step(Batch(views, batches[0].labels, batches[0].index), number)

    trainer.train_step = spoiled  # type: ignore[assignment]
    result = trainer.fit()
    assert (result.steps, result.skipped_steps) == (6, 6)
    assert math.isnan(result.embedding_std)
    assert (result.problem or "").startswith("every step was skipped: no loss was finite")
    assert str(result.problem) in caplog.text
    assert RunDir(result.run_dir).problem() == result.problem


@pytest.mark.parametrize("changes", [{}, {"method": "simsiam", "steps": 12}])
def test_healthy_run_has_no_problem(small: Config, changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = configs.replace(small, {"steps": 25} | changes)
    result = Trainer(config).fit()
    records = read(result.run_dir / "metrics.jsonl")
    stds = [r["embedding_std"] for r in records][-math.ceil(config.steps / 10) :]
    assert result.embedding_std == pytest.approx(np.mean(stds))
    assert (result.problem, result.skipped_steps, warnings_of(caplog)) == (None, 0, [])
    assert result.images == config.steps * 12
    seconds = sum(12 / r["images_per_second"] for r in records)
    assert result.images_per_second == pytest.approx(result.images / seconds)
