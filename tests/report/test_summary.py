"""The sentences at the top of a report: health of the run, and comparisons of accuracies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.test_report import EVALUATION, page_of, run_folder, steps


@pytest.mark.parametrize(
    ("std", "batch_size", "verdict"),
    [
        (0.95, 64, "Healthy: the embedding std is 0.95 (1 is healthy, 0 is collapsed)"),
        (0.35, 64, "Partly collapsed"),
        (0.02, 64, "Collapsed: the embedding"),
        # 0.62 in large batches, as measured on CIFAR-10; normal numbers have a std of sqrt(1 / pi) in pairs
        (0.62 * 0.564, 2, "Healthy: the embedding std is 0.35 (in batches of 2, 0.56 is healthy, 0 is collapsed)"),
        (0.62 * 0.798, 4, "Healthy: the embedding std is 0.49 (in batches of 4, 0.80 is healthy, 0 is collapsed)"),
        (0.2, 2, "Partly collapsed: the embedding std is 0.20 (above 0.28 is healthy)"),
        (0.02, 2, "Collapsed: the embedding"),
    ],
)
def test_collapse_is_reported(std: float, batch_size: int, verdict: str, tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run", steps(12, std=std), batch_size=batch_size))
    assert verdict in page.text
    assert ("warn" in [a.get("class") for t, a in page.tags if t == "p"]) == ("Healthy" not in verdict)


@pytest.mark.parametrize(("local_views", "shown"), [(0, "32 px"), (2, "32 px, 2 local views")])
def test_local_views_are_named(local_views: int, shown: str, tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run", steps(2), num_local_views=local_views))
    assert f"recipe cifar10_resnet18, {shown}Loss" in page.text


@pytest.mark.parametrize(
    ("evaluations", "count", "figure", "sentence"),
    [
        # Wilson intervals: 26 of 100 is 18.4 to 35.4 %, 20 is 13.3 to 28.9 %.
        ([0.26, 0.20, 0.24], 100, "24.0%step 3; best 24.0% at step 3", "that of the untrained encoder 26.0%; the 95 %"),
        # 260 of 1,000 is 23.4 to 28.8 %, 200 is 17.6 to 22.6 %.
        (
            [0.26, 0.22, 0.20],
            1000,
            "20.0%step 3; best 22.0% at step 2",
            "6.0 points below the untrained encoder (26.0%)",
        ),
        ([0.20, 0.26], 1000, "26.0%step 2", "6.0 points above the untrained encoder (20.0%)."),
        ([0.26, 0.20], None, "20.0%step 2", "that of the untrained encoder 26.0%."),  # by an earlier version
        ([0.26], 1000, "26.0%untrained", ""),
    ],
)
def test_accuracies_are_compared_if_their_intervals_do_not_overlap(
    evaluations: list[float], count: int | None, figure: str, sentence: str, tmp_path: Path
) -> None:
    """And the untrained encoder's accuracy, at step 0, is not called the best of the training."""
    records = [
        {"step": i and i + 1, "knn_top1": top1, "knn_k": 20, "knn_num_val": count} for i, top1 in enumerate(evaluations)
    ]
    text = page_of(run_folder(tmp_path / "run", [records[0], *steps(1), *records[1:]])).text
    assert f"kNN-20 top-1{figure}" in text
    assert f"kNN top-1 accuracy is {evaluations[-1]:.1%}, {sentence}" in text if sentence else "accuracy is" not in text
    assert " overlap" not in text or sentence.endswith("%; the 95 %")


def test_better_baseline_is_a_warning(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(30))
    (folder / "eval").mkdir()
    baselines = [
        {"name": name, "top1": 0.5, "top1_ci95": interval}
        for name, interval in (
            ("untrained", [0.46, 0.54]),
            ("overlapping", [0.44, 0.56]),
            ("of unknown interval", None),
        )
    ]
    record = EVALUATION | {"top1": 0.4, "top1_ci95": [0.36, 0.44], "baselines": baselines}
    (folder / "eval" / "knn.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert page.text.count("knn: 40.0% is below the baseline untrained, 50.0%.") == 2  # in the summary, too
    assert page.text.count("is below the baseline") == 2
