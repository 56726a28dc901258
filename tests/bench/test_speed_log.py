"""Logs of speed runs: times, means and evaluations, without a run."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byol_fast.bench.speed_log import SpeedLog, median_minutes, summarize, table
from byol_fast.bench.speed_plan import SpeedPlan, speed_run_config
from byol_fast.bench.speed_recorder import Mark
from byol_fast.config import Config, recipes
from byol_fast.utils.telemetry import Telemetry


def test_power_and_speed_are_means_of_an_interval() -> None:
    begin, end = Mark(10, 5.0, 100.0, 1000.0), Mark(30, 9.0, 110.0, 4000.0)  # 4 s of training within 10 s
    assert (end.images_per_second(begin, 8), end.watts(begin)) == (40.0, 300.0)
    assert end._replace(joules=None).watts(begin) is None and begin.images_per_second(begin, 8) is None
    assert Telemetry(torch.device("cpu")).energy() is None


def test_time_to_a_threshold_is_that_of_the_first_evaluation_above() -> None:
    def log(seed: int, *accuracies: float) -> SpeedLog:
        header = SpeedLog.new(Path("x"), Config(recipe="r", seed=seed), command="", minutes=None).header
        lines = [{"seconds": 60.0 * i, "knn_top1": accuracy} for i, accuracy in enumerate(accuracies)]
        return SpeedLog(Path("x"), header, lines)

    logs = [log(0, 0.1, 0.868, 0.85, 0.92), log(1, 0.1, 0.2, 0.87), log(2, 0.1, 0.2, 0.3)]
    times = summarize(logs)["recipes"]["r"]["minutes_to"]
    assert times == {"0.868": {"all": [1, 2, None], "median": 2}, "0.91": {"all": [3, None, None], "median": None}}
    assert median_minutes([4.0, None]) is None and median_minutes([4.0, 5.0]) == statistics.median([4, 5])
    lines = table(summarize(logs))
    assert "  r: 86.8% after 2.0 (median of 3 seeds: after 1.0, after 2.0, not reached)" in lines
    assert any("400.9" in line for line in lines)


def test_evaluations_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    log = SpeedLog(tmp_path / "log", {}, [{"step": step} for step in (0, 10, 20)])
    log.drop_after(10, evaluated=True)
    assert [line["step"] for line in log.evaluations] == [0, 10]
    log.drop_after(10, evaluated=False)
    assert [line["step"] for line in log.evaluations] == [0]


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (20, 1), (21, 2), (200, 10), (1000, 50)])
def test_evaluations_are_about_twenty(epochs: int, every: int, tmp_path: Path) -> None:
    config = speed_run_config(recipes.cifar10_fast())
    plan = SpeedPlan(configs=(config,), output=tmp_path)
    assert plan.with_epochs(config, epochs).knn.every_epochs == every
    assert replace(plan, knn_every=3).with_epochs(config, epochs).knn.every_epochs == 3
