"""Timing, processes, results and their comparison."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast.bench.compare import compare
from byol_fast.bench.data import check_levels
from byol_fast.bench.options import Options
from byol_fast.bench.processes import Job, measure
from byol_fast.bench.results import Results, load
from byol_fast.bench.runner import Bench
from byol_fast.bench.synthetic_jpegs import write_synthetic_jpegs
from byol_fast.bench.timing import Timing, interleaved, ratio
from byol_fast.cli import bench as command
from byol_fast.config import ConfigError
from byol_fast.utils import env


def test_rounds_are_interleaved_and_warmup_is_discarded() -> None:
    calls: list[str] = []
    now = [0.0]

    def case(name: str, first: float, later: float) -> None:
        now[0] += later if name in calls else first
        calls.append(name)

    times = interleaved(
        {"a": lambda: case("a", 100.0, 2.0), "b": lambda: case("b", 100.0, 3.0)},
        rounds=3,
        warmup=1,
        clock=lambda: now[0],
    )
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert times["a"].seconds == (2.0, 2.0, 2.0)
    assert times["b"].seconds == (3.0, 3.0, 3.0)


def test_level_check_allows_for_chance_and_finds_gross_errors() -> None:
    """White images, of which each candidate solarizes a fifth on its own: the mean level is random."""
    rng = np.random.default_rng(0)

    def views(scale: float = 1.0) -> list[torch.Tensor]:
        levels = torch.from_numpy(np.where(rng.random((2, 64, 1, 1, 1)) < 0.2, 0.0, scale))
        return list(levels.expand(-1, -1, 3, 4, 4))

    for _ in range(50):
        check_levels({"a": views, "b": views, "c": views})
    for scale in (1 / 255, 0.5):
        with pytest.raises(AssertionError, match="c: mean and std of the levels are"):
            check_levels({"a": views, "b": views, "c": functools.partial(views, scale)})


def test_case_order_is_shuffled() -> None:
    calls: list[str] = []
    interleaved({name: functools.partial(calls.append, name) for name in "abc"}, rounds=12, warmup=0)
    followed = {pair for pair in itertools.pairwise(calls) if pair[0] != pair[1]}
    assert followed == set(itertools.permutations("abc", 2))


def test_ratio_ignores_rounds_that_are_slow_for_both_cases() -> None:
    slow, fast = Timing((2.0, 20.0, 4.0)), Timing((1.0, 10.0, 2.0))
    assert ratio(slow, fast) == (2.0, 2.0, 2.0)
    assert fast.median == 2.0


def test_interleaved_without_cases_raises() -> None:
    with pytest.raises(ValueError, match="cases and rounds must be at least one"):
        interleaved({}, rounds=3)


def results(times: dict[str, Timing], **options: Any) -> Results:
    built = Results("step", "cpu", {"batch_size": 32})
    built.add("suite", times, **options)
    return built


def test_saved_results_are_loaded_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"byol_fast": Timing((1.0, 2.0, 4.0)), "other": Timing((2.0, 4.0, 8.0))}
    original = results(times, unit="images/s", num_items=32, baseline="other", extras={"other": {"version": "1.6"}})
    assert "0.50x [0.50 - 0.50]" in capsys.readouterr().out  # half as fast as the first
    original.save(tmp_path / "results")
    with (tmp_path / "results" / "step.csv").open() as file:
        first, other = csv.DictReader(file)
    assert (float(first["p50"]), float(other["p50"]), float(other["ratio"])) == (16.0, 8.0, 2.0)
    assert float(first["p20"]) < float(first["p50"]) < float(first["p80"])
    assert (first["version"], other["version"]) == ("", "1.6")
    record = json.loads((tmp_path / "results" / "environment.json").read_text())
    assert record["device"] == "cpu"
    assert {"commit", "dirty", "load", "date"} <= record.keys()
    content, (suite,) = load(tmp_path / "results" / "step.json")
    assert content["settings"] == {"batch_size": 32}
    assert content["environment"] == record
    assert suite == original.suites[0]
    with Image.open(tmp_path / "results" / "step.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x00, 0x72, 0xB2), (0x9A, 0xA5, 0xAD)} <= colors  # a bar of byol_fast, and one of another candidate


def test_commit_of_a_checkout_is_recorded() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert env.git_state()["commit"] == head.stdout.strip()


def rounds(seconds: float, spread: float, seed: int, machine: np.ndarray | None = None) -> Timing:
    noise = 1 + spread * np.random.default_rng(seed).standard_normal(11)
    return Timing(tuple(float(s) for s in seconds * noise * (1 if machine is None else machine)))


def save_results(folder: Path, seconds: float, seed: int, *, baseline: str = "baseline") -> Path:
    """Two candidates, each with 2 % noise, on a machine whose speed varies by up to 60 % from round to round."""
    machine = 1 + 0.6 * np.random.default_rng(seed + 1).random(11)
    times = {
        "baseline": rounds(1.0, 0.02, seed + 2, machine),
        "byol_fast, bf16": rounds(seconds, 0.02, seed + 3, machine),
    }
    results(times, baseline=baseline).save(folder)
    return folder


def test_slowdown_of_15_percent_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = save_results(tmp_path / "a", 0.50, 0), save_results(tmp_path / "b", 0.575, 10)
    (change,) = compare(before, after)
    assert (change.candidate, change.verdict) == ("byol_fast, bf16", "slower")
    assert change.relative == pytest.approx(0.15, abs=0.03)
    assert command.main(["compare", str(before), str(after)]) == 1
    assert "slower" in capsys.readouterr().out
    assert command.main(["compare", str(after), str(before)]) == 0  # faster is no regression
    assert "1 faster" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_equal_runs_have_no_changes(tmp_path: Path, seed: int) -> None:
    before, after = save_results(tmp_path / "a", 0.5, seed), save_results(tmp_path / "b", 0.5, seed + 10)
    assert {c.verdict for c in compare(before, after)} == {"same"}
    assert command.main(["compare", str(before), str(after)]) == 0


def test_noise_grows_with_the_spread_of_the_rounds(tmp_path: Path) -> None:
    for name, seconds, spread in (("a", 0.5, 0.3), ("b", 0.56, 0.3)):
        results({"byol_fast": rounds(seconds, spread, int(100 * seconds))}).save(tmp_path / name)
    (change,) = compare(tmp_path / "a", tmp_path / "b")
    assert change.noise > 0.2
    assert change.verdict == "same"


def test_short_calls_need_a_larger_change(tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1.2), ("c", 1.4)):
        times = {"baseline": rounds(2e-3, 0.01, 0), "byol_fast": rounds(factor * 1e-3, 0.01, 1)}
        results(times, baseline="baseline").save(tmp_path / name)
    assert [c.verdict for c in compare(tmp_path / "a", tmp_path / "b")] == ["same"]
    assert [c.verdict for c in compare(tmp_path / "a", tmp_path / "c")] == ["slower"]


@pytest.mark.slow
def test_slowdown_of_real_work_is_a_regression(tmp_path: Path) -> None:
    x = torch.randn(128, 128)

    def work(times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                torch.mm(x, x)

        return run

    for name, products in (("a", 1000), ("equal", 1000), ("slow", 1150)):
        cases = {"baseline": work(2000), "byol_fast": work(products)}
        times = interleaved(cases, rounds=21, clock=time.process_time)
        results(times, baseline="baseline").save(tmp_path / name)
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "equal")]) == 0
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "slow")]) == 1


def test_comparison_of_invalid_files_raises(tmp_path: Path) -> None:
    good = save_results(tmp_path / "good", 0.5, 0)
    with pytest.raises(ValueError, match="holds no results"):
        compare(good, tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "step.json").write_text("{")
    with pytest.raises(ValueError, match="must be results that `byol-fast bench --save` wrote"):
        compare(good, tmp_path / "bad")
    content = json.loads((good / "step.json").read_text())
    suite = content["suites"][0]
    first, *others = suite["candidates"]
    for changed, problem in (
        ({"suites": 3}, "suites must be a list, got 3"),
        ({"suites": [suite | {"unit": None}]}, r"suites\[0\].unit must be text, got null"),
        ({"suites": [suite | {"more": 1}]}, "TypeError"),
        (
            {"suites": [suite | {"candidates": [first | {"seconds": ["x"]}, *others]}]},
            r"suites\[0\].candidates\[0\].seconds\[0\] must be a number",
        ),
        ({"suites": [suite | {"candidates": [first | {"seconds": [1.0]}, *others]}]}, ".*as many positive times"),
    ):
        (tmp_path / "bad" / "step.json").write_text(json.dumps(content | changed))
        with pytest.raises(ConfigError, match=f"must be results that .* wrote, but {problem}"):
            compare(good, tmp_path / "bad")
    content |= {"format": 0}
    (tmp_path / "bad" / "step.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be of format 2, got 0"):
        compare(good, tmp_path / "bad")
    other = Results("step", "cpu")
    other.add("another suite", {"byol_fast": Timing((1.0,))})
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="must have a suite in common"):
        compare(good, tmp_path / "other")


class Sleepy:
    """A candidate that sleeps, and fails after some calls."""

    extras: dict[str, float]

    def __init__(self, seconds: float, calls: int) -> None:
        self.seconds, self.calls, self.extras = seconds, calls, {"threads": torch.get_num_threads()}

    def __call__(self) -> None:
        time.sleep(self.seconds)
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("tired")


def test_failing_candidate_is_dropped_with_its_reason() -> None:
    jobs = {
        "steady": Job(factory="tests.bench.test_results:Sleepy", arguments={"seconds": 0.02, "calls": 9}),
        "tires": Job(factory="tests.bench.test_results:Sleepy", arguments={"seconds": 0.0, "calls": 2}),
        "missing": Job(factory="tests.bench.test_results:NoSuchThing"),
    }
    measurements = measure(jobs, rounds=3, warmup=1, threads=1, device=torch.device("cpu"))
    assert "RuntimeError: tired" in measurements["tires"].failure
    assert "AttributeError" in measurements["missing"].failure
    assert measurements["tires"].wall == []
    steady = measurements["steady"]
    assert steady.failure == ""
    assert len(steady.wall) == len(steady.cpu) == 3
    assert min(steady.wall) >= 0.02 > max(steady.cpu)  # asleep, it costs no CPU time
    assert steady.extras["threads"] == 1
    assert steady.extras["peak_gib"] > 0


def test_synthetic_jpegs_have_imagenet_like_sizes(tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in write_synthetic_jpegs(tmp_path / "a", 4).iterdir()]
    assert 60_000 < np.mean(sizes) < 200_000
    again = write_synthetic_jpegs(tmp_path / "b", 4)
    assert all((tmp_path / "a" / path.name).read_bytes() == path.read_bytes() for path in again.iterdir())


def test_recipe_sets_the_problem(tmp_path: Path) -> None:
    bench = Bench(Options(recipe="cifar10_resnet18", device="cpu", batch_size=16, precision="fp32"))
    assert (bench.problem.encoder, bench.problem.cifar_stem, bench.problem.image_size) == ("resnet18", True, 32)
    assert (bench.problem.batch_size, bench.precision.name, bench.mode) == (16, "fp32", "eager")
    with pytest.raises(ConfigError, match="batch_size must be at least 2, got 1"):
        Bench(Options(device="cpu", batch_size=1))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"bench: .*/file cannot be written .*--save"):
        Bench(Options(device="cpu", save=tmp_path / "file")).run()


@pytest.mark.slow
def test_all_suites_run(tmp_path: Path) -> None:
    options = Options(
        device="cpu", batch_size=4, image_size=32, rounds=1, data_images=8, kernel_images=2, save=tmp_path / "results"
    )
    Bench(options).run()
    for name in ("peers", "kernels", "data", "step", "end-to-end"):
        _, suites = load(tmp_path / "results" / f"{name}.json")
        for suite in suites:
            assert len(suite.candidates) >= 2, suite.name
            assert not suite.baseline or suite.baseline in {c.name for c in suite.candidates}
            assert any(c.name.startswith("byol_fast") for c in suite.candidates)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_measured_where_the_cpu_has_instructions_for_it(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "cpu_has_bf16", lambda: has_bf16)
    names: list[str] = []
    monkeypatch.setattr(Bench, "measure_steps", lambda self, results, name, steps, rounds: names.extend(steps))
    for precision in ("auto", "bf16"):
        bench, built = Bench(Options(device="cpu", precision=precision)), Results("step", "cpu")
        for suite in (bench.peers, bench.step):
            names.clear()
            suite(built, 1)
            assert any("bf16" in name for name in names) == (has_bf16 or precision == "bf16")
            assert any("fp32" in name for name in names)
