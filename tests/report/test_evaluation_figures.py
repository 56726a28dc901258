"""Charts of evaluations beside their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byol_fast.config import ConfigError
from byol_fast.report.evaluation_figures import MAX_CLASSES, save_figures
from tests.report.parsing import svg, texts

RECORD: dict[str, Any] = {
    "protocol": "linear",
    "encoder": "resnet18 of runs/a",
    "classes": ["cat", "dog", "emu"],
    "top1": 0.8,
    "top1_ci95": [0.7, 0.9],
    "baselines": [{"name": "raw pixels", "top1": 0.4, "top1_ci95": [0.3, 0.5]}],
    "per_class": [
        {"class": "cat", "count": 2, "accuracy": 0.5, "ci95": [0.1, 0.9]},
        {"class": "dog", "count": 3, "accuracy": 1.0, "ci95": [0.4, 1.0]},
        {"class": "emu", "count": 0, "accuracy": None, "ci95": [0.0, 1.0]},
    ],
    "confusion": [[0, 0, 1], [0, 1, 1], [1, 1, 3]],
    "curve": [{"x": 0.001, "top1": 0.7}, {"x": 0.1, "top1": 0.8}],
    "curve_label": "l2",
}


def test_figures_show_record(tmp_path: Path) -> None:
    paths = save_figures(RECORD, tmp_path)
    assert [p.name for p in paths] == ["linear.svg", "linear_classes.svg", "linear_confusion.svg", "linear_curve.svg"]
    accuracy, classes, confusion, curve = (texts(svg(path.read_text())) for path in paths)
    assert {"linear, resnet18 of runs/a", "raw pixels", "this encoder", "40.0%", "80.0%", "top-1, %"} <= set(accuracy)
    assert {"cat", "dog", "50.0%", "100.0%"} <= set(classes)
    assert "emu" not in classes  # without test images
    assert {"predicted class", "true class", "emu", "100"} <= set(confusion)
    assert confusion.count("50") == 2
    assert "l2" in curve


def test_outdated_figures_are_removed(tmp_path: Path) -> None:
    save_figures(RECORD, tmp_path)
    save_figures(RECORD | {"curve": []}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"linear.svg", "linear_classes.svg", "linear_confusion.svg"}
    names = [str(i) for i in range(MAX_CLASSES + 1)]
    many = [{"class": name, "count": 1, "accuracy": 1.0, "ci95": [0.2, 1.0]} for name in names]
    save_figures(RECORD | {"classes": names, "per_class": many}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"linear.svg", "linear_classes.svg", "linear_curve.svg"}


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written .*choose another folder with --output"):
        save_figures(RECORD, tmp_path / "missing")
