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


SHOTS = [
    {"name": name, "shots": n, "k": n, "top1": top1, "top1_ci95": [0.2, 0.6], "lowest": 0.1, "highest": 0.7}
    for name, n, top1 in (("this encoder", 1, 0.31), ("this encoder", 5, 0.52), ("raw pixels", 1, None))
]
RETRIEVAL: dict[str, Any] = {
    "protocol": "retrieval",
    "encoder": "resnet18 of runs/a",
    "num_test": 70,
    "mean_ap": 0.36,
    "mean_ap_ci95": [0.3, 0.4],
    "recall": [{"k": 1, "recall": 0.46, "ci95": [0.4, 0.5]}, {"k": 5, "recall": 0.81, "ci95": None}],
    "num_left_out": 2,
    "baselines": [{"name": "raw pixels", "mean_ap": 0.47, "mean_ap_ci95": [0.45, 0.5]}],
}


def test_figures_of_shots_and_retrieval(tmp_path: Path) -> None:
    paths = save_figures(RECORD | {"protocol": "knn", "shots": SHOTS}, tmp_path)
    assert [p.name for p in paths if "shots" in p.name] == ["knn_shots.svg"]
    shots = texts(svg((tmp_path / "knn_shots.svg").read_text()))
    assert {"this encoder, 1", "this encoder, 5", "31.0%", "52.0%", "top-1, %"} <= set(shots)
    assert "raw pixels, 1" not in shots
    (path,) = save_figures(RETRIEVAL, tmp_path)
    assert path.name == "retrieval.svg"
    assert {"raw pixels", "this encoder", "36.0%", "47.0%", "mAP, %"} <= set(texts(svg(path.read_text())))


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
