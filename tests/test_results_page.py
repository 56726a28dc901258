"""docs/results.md: figures, statuses and links from result files, and what it says without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import ROOT, render
from benchmarks.records import EARLIER, KINDS
from benchmarks.results_page import (
    TABLES,
    demo_output,
    demo_table,
    local_views_table,
    recipes_table,
    speed_table,
    trials_table,
)
from byol_fast import config as configs
from byol_fast.bench.published import PUBLISHED
from byol_fast.bench.speed_log import SpeedLog
from byol_fast.bench.speed_plan import speed_run_config
from byol_fast.config import recipes
from byol_fast.training.resume import config_digest

RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENT: dict[str, Any] = {"cpu": "a CPU", "cpus": 2, "date": "2026-01-02", "packages": {"torch": "2"}}
ENVIRONMENT |= {"commit": "0123456789abcdef", "dirty": False}
PLAIN = (0.76, 0.77, 0.78)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def demo_run(seed: int, plain: float, **changes: Any) -> dict[str, Any]:
    """Line of a seed of the demo."""
    top1 = {
        "raw pixels": dict.fromkeys(KINDS, 0.8),
        "untrained": dict.fromkeys(KINDS, 0.6),
        "trained": dict(zip(KINDS, (plain, 0.7, 0.6, 0.74), strict=True)),
    }
    config = recipes.demo()
    run = {"seed": seed, "top1": top1, "seconds": 100 + seed, "epochs": config.epochs, "num_val": 2000}
    run |= {"command": "make demo", "config_digest": config_digest(config), "environment": ENVIRONMENT}
    return run | changes


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Results of the demo with three seeds, in a folder without other results."""
    runs = [demo_run(seed, plain) for seed, plain in enumerate(PLAIN)]
    write_lines(tmp_path / "demo_cpu" / "final.jsonl", runs)
    return tmp_path


def row(lines: list[str], name: str) -> list[str]:
    """Cells of the only row of a table that begins with a name."""
    (line,) = (line for line in lines if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_recipe_row_has_mean_interval_seeds_time_and_digest(measured: Path) -> None:
    # The interval of the mean is scipy.stats.binomtest(1540, 2000).proportion_ci(method="wilson").
    expected = "as they are 77.0 % [75.1 - 78.8], seeds 76.0 - 78.0"
    name, digest, _, reached, time, status = row(recipes_table(measured), "`demo`")
    assert (name, digest) == ("`demo`", f"`{config_digest(recipes.demo())}`")
    assert expected in reached
    assert expected.removeprefix("as they are ") in row(demo_table(measured), "as they are")
    assert time == "1 min 41 s, a CPU, 2 cores"
    assert status == "measured"


def test_published_figure_stands_in_its_recipes_row(tmp_path: Path) -> None:
    cells = row(recipes_table(tmp_path), "`imagenet_resnet50`")
    assert cells[2] == (
        "linear: 74.3 % ([DeepMind, batch 4096, 1000 epochs](https://arxiv.org/abs/2006.07733); "
        "480 min on 512 TPU v3 cores)"
    )


def test_published_results_name_recipes() -> None:
    assert {result.recipe for result in PUBLISHED} - {""} <= set(recipes.RECIPES)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"optim.lr": 0.123}, EARLIER),
        ({"view1.scale": (0.4, 1.0)}, EARLIER),
        ({"epochs": 9}, "measured with 5 epochs instead of 9"),
        ({"seed": 5, "device": "cpu", "knn.every_epochs": 1}, "measured"),
    ],
    ids=["learning rate", "crops", "epochs", "what is not computed"],
)
def test_result_of_another_configuration_is_marked(
    measured: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], status: str
) -> None:
    config = configs.replace(recipes.demo(), {"epochs": 5})
    write_lines(
        measured / "demo_cpu" / "final.jsonl", [demo_run(0, 0.7, epochs=5, config_digest=config_digest(config))]
    )
    monkeypatch.setitem(recipes.RECIPES, "demo", lambda: configs.replace(config, changes))
    assert row(recipes_table(measured), "`demo`")[-1] == status


def test_seeds_of_two_configurations_are_two_results(measured: Path) -> None:
    runs = [demo_run(0, 0.7), demo_run(1, 0.5, config_digest="0" * 12)]
    write_lines(measured / "demo_cpu" / "final.jsonl", runs)
    _, _, _, reached, _, status = row(recipes_table(measured), "`demo`")
    assert status == f"measured<br>{EARLIER}"
    assert "as they are 70.0 %" in reached.split("<br>")[0]
    assert "as they are 50.0 %" in reached.split("<br>")[1]


def test_what_has_no_result_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "demo_gpu").mkdir()
    write_lines(tmp_path / "another_machine" / "unknown.jsonl", [{"value": 1}])
    table = recipes_table(tmp_path)
    assert len(table) == 2 + len(recipes.RECIPES)
    for name in recipes.RECIPES:
        assert row(table, f"`{name}`")[3:] == ["not measured", "", "not measured"]
    assert demo_table(tmp_path) == trials_table(tmp_path) == ["Not measured."]
    assert row(speed_table(tmp_path), "**byol_fast**")[1] == "not measured"
    text = "<!-- table demo-output -->\nas it was\n<!-- end table -->"
    assert render(text, tmp_path) == text


def test_result_without_digest_says_so() -> None:
    *_, reached, time, status = row(recipes_table(RESULTS), "`cifar10_resnet18`")
    assert "26.1 % [25.3 - 27.0]" in reached  # 0.2613 of 10,000 images
    assert time == "4 s, NVIDIA H200"
    assert status == "configuration not recorded, only 0.77 epochs"


def test_every_number_has_command_environment_and_log(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    write_lines(results / "demo_new" / "final.jsonl", [demo_run(0, 0.7, command="byol-fast demo")])
    table = TABLES["numbers"](results)
    assert table is not None
    cells = row([line for line in table if "demo_new" in line], "`demo`")
    file = "../benchmarks/results/demo_new/final.jsonl"
    assert cells[2:] == [
        "`byol-fast demo`",
        f"`{config_digest(recipes.demo())}`",
        f"[a CPU, 2 cores, torch 2, commit 012345678, 2026-01-02]({file})",
        f"[final.jsonl]({file})",
    ]
    assert row(table, "ResNet-18, images of 96 px")[3:] == ["not recorded"] * 3


def test_output_of_the_demo_is_that_of_the_first_seed(measured: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    text = render("<!-- table demo-output -->\nold\n<!-- end table -->\n", measured).splitlines()
    assert text[2:6] == [
        "                              as they are   cropped   shifted   flipped",
        " raw pixels                         80.0%     80.0%     80.0%     80.0%",
        " untrained (norms calibrated)       60.0%     60.0%     60.0%     60.0%",
        " after BYOL, without labels         76.0%     70.0%     60.0%     74.0%",
    ]
    assert text[2] in readme
    assert text[-2].startswith("(`benchmarks/results/demo_cpu/final.jsonl`: seed 0, ")
    write_lines(measured / "demo_cpu" / "final.jsonl", [])
    assert demo_output(measured) is None


def test_trials_of_each_round_are_ranked(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"size": 28, "batch_size": 64, "images_per_cpu_second": 500.0}]
    for seconds, tau, top1 in ((40, 0.8, 0.9), (300, 0.9, 0.5), (300, 0.95, 0.7), (300, 0.99, 0.6)):
        line = {"trial": {"tau": tau}, "top1": dict.fromkeys(KINDS, top1), "score": top1}
        lines.append(line | {"cpu_seconds": seconds, "process_cpu_seconds": seconds + 5.0})
    write_lines(tmp_path / "demo_cpu" / "search.jsonl", lines)
    table = trials_table(tmp_path)
    rows = [line.split("|")[1] for line in table if line.startswith("| tau") or "CPU-seconds" in line]
    assert rows == [
        " settings, 40 CPU-seconds of training ", " tau 0.8 ",
        " settings, 300 CPU-seconds of training ", *(f" tau {tau} " for tau in (0.95, 0.99, 0.9)),
    ]  # fmt: skip
    assert table[-1].endswith("all 4 trials took 16 min 00 s of CPU time)")


def test_local_views_are_compared_by_the_means_of_their_seeds(tmp_path: Path) -> None:
    path, num_val = tmp_path / "demo_cpu" / "local_views.jsonl", 2000
    speeds = {"images_per_cpu_second": [300, 200], "time_ratio": 1.5, "time_ratios": [1.4, 1.5, 1.6]}
    write_lines(path, [speeds])
    assert local_views_table(tmp_path) == ["Not measured."]
    runs = [
        {"setting": setting, "seed": seed, "epochs": epochs, "num_val": num_val, "environment": ENVIRONMENT}
        | {"top1": dict.fromkeys(KINDS, top1 + 0.01 * seed)}
        for seed in range(3)
        for setting, epochs, top1 in (("two views", 11.0, 0.7), ("equal time", 7.33, 0.65))
    ]
    write_lines(path, [speeds, *runs])
    table = local_views_table(tmp_path)
    assert row(table, "two views")[1] == "11" and "71.0 % [" in row(table, "two views")[2]
    assert row(table, "equal time")[1] == "7.33" and "seeds 65.0 - 67.0" in row(table, "equal time")[-1]
    assert "seed 0, 1, 2; an image takes 1.50 [1.40 - 1.60] times as long with them; 2,000 images" in table[-1]


def test_speed_run_has_the_median_time_to_each_accuracy(tmp_path: Path) -> None:
    for seed, speed in enumerate((1.0, 2.0, 3.0)):
        config = speed_run_config(configs.replace(recipes.cifar10_resnet18(), {"epochs": 200, "seed": seed}))
        path = tmp_path / "a_gpu" / f"cifar10_resnet18-seed{seed}.jsonl"
        log = SpeedLog.new(path, config, command="byol-fast bench cifar10", minutes=None)
        log.header |= {"environment": ENVIRONMENT | {"gpu": "a GPU"}, "finished": seed < 2, "starts": 1}
        log.header |= {"images": {"train": 50_000, "val": 10_000, "fingerprint": "0"}, "seconds": 180 * speed}
        for minutes, top1 in ((1, 0.5), (2, 0.869), (3, 0.9 + 0.01 * seed)):
            line = {"seconds": 60 * minutes * speed, "epoch": 10 * minutes, "step": 100 * minutes, "knn_top1": top1}
            log.evaluations.append(line | {"knn_low": 0.0, "knn_high": 1.0, "knn_k": 200, "num_val": 10_000})
        path.parent.mkdir(exist_ok=True)
        log.save()
    cells = row(speed_table(tmp_path), "**`cifar10_resnet18`**, 3 seeds")
    assert cells[1].endswith(", seeds 90.0 - 92.0")
    assert cells[2:] == ["6.0 (3.0, 6.0, 9.0)", "4.0 (2.0, 4.0, 6.0)", "9.0 (not reached, 6.0, 9.0)", "a GPU"]
    *_, time, status = row(recipes_table(tmp_path), "`cifar10_resnet18`")
    assert (time, status) == ("6 min 00 s, a GPU", "measured with 200 epochs instead of 1000, not finished")


def test_damaged_files_and_unknown_tables_are_errors(measured: Path) -> None:
    with pytest.raises(ValueError, match=r"a table must be one of recipes, .*got 'nothing'"):
        render("<!-- table nothing -->\n<!-- end table -->", measured)
    path = measured / "demo_cpu" / "final.jsonl"
    write_lines(path, [demo_run(0, 0.7), demo_run(1, 0.7, environment={})])
    with pytest.raises(ValueError, match=r"demo_cpu/final.jsonl, line 2: environment.cpu is missing"):
        recipes_table(measured)
    write_lines(path, [demo_run(0, 76.0)])
    with pytest.raises(ValueError, match=r"line 1: top1.trained.as they are must be a number from 0 to 1, got 76.0"):
        recipes_table(measured)
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"demo_cpu/final.jsonl, line 1: it must be a JSON object"):
        recipes_table(measured)
