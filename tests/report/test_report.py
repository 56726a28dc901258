"""Reports of runs: the numbers of the run's files, in whatever state these are, on a self-contained page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import byol_fast
from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.report.build import report
from byol_fast.report.callback import ReportCallback
from byol_fast.report.charts import Series, line_chart
from byol_fast.report.page import Section, figure, paragraph, table, write_page
from byol_fast.report.reading import read_run
from byol_fast.report.svg import COLORS, DARK_COLORS
from byol_fast.training.trainer import Trainer
from tests.report.parsing import HOSTILE, Page, read, svg, texts
from tests.report.test_evaluation_figures import RETRIEVAL, SHOTS

Record = dict[str, Any]


def steps(count: int, *, std: float = 0.9, per_epoch: int = 10, **others: float) -> list[Record]:
    """Records of steps with as few numbers as a report needs: each number is a chart."""
    return [
        {"step": i, "epoch": round(i / per_epoch, 4), "loss": 4 / i, "embedding_std": std, **others}
        for i in range(1, count + 1)
    ]


def run_folder(folder: Path, records: list[Record], **changes: object) -> Path:
    config = configs.replace(
        recipes.cifar10_resnet18(), {"epochs": 3, "batch_size": 64, "data.builtin": "demo"} | changes
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
    (folder / "environment.json").write_text(json.dumps({"cpu": "a CPU <fast>", "packages": {"torch": "2.15"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def page_of(*runs: Path, **options: Any) -> Page:
    return read(report(runs, runs[0] / "out.html", **({"pictures": False} | options)).read_text())


# ---- pages --------------------------------------------------------------------------------------------------------


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    rows = [[HOSTILE, 3, 2.34567, None], ["b", 4, float("nan"), "x"]]
    sections = [Section(HOSTILE, paragraph(HOSTILE)), Section("Same", table([HOSTILE, "n", "v", "w"], rows))]
    write_page(tmp_path / "page.html", HOSTILE, [*sections, Section("Same", "")])
    page = read((tmp_path / "page.html").read_text())
    assert page.text.count("<script>alert('x')</script>") >= 5
    assert page.rows[1][1:] == ["3", "2.346", "\N{EN DASH}"]
    assert page.rows[2] == ["b", "4", "\N{EN DASH}", "x"]
    assert page.headings[2:] == ["Same", "Same"]


def test_embedded_picture_is_unchanged() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    (tag, attributes), *_ = [t for t in Page(figure(image, HOSTILE)).tags if t[0] == "img"]
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", attributes["src"] or "").groups()  # type: ignore[union-attr]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (tag, kind, shown.size) == ("img", "png", (4, 4))
    assert np.array_equal(np.asarray(shown), np.asarray(image))
    assert "alert('x')" in (attributes["alt"] or "")


def test_page_has_a_dark_mode_and_fits_a_phone(tmp_path: Path) -> None:
    chart = line_chart([Series("a", [0, 1], [0, 1])], title="t", x_label="x", y_label="y")
    write_page(
        tmp_path / "page.html", "t", [Section("s", chart + table(["a"], [["b"]]) + figure(Image.new("L", (9, 9)), "c"))]
    )
    text = (tmp_path / "page.html").read_text()
    page = read(text)
    light, dark = text.split("@media screen and (prefers-color-scheme: dark)")[:2]
    for i, (color, dark_color) in enumerate(zip(COLORS, DARK_COLORS, strict=True)):
        assert f"--chart-{i}:{color};" in light
        assert f"--chart-{i}:{dark_color};" in dark
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)", text)) <= defined
    attributes = dict(page.tags)
    assert attributes["svg"]["width"] == "100%"
    assert "viewbox" in attributes["svg"]
    assert {"content": "width=device-width, initial-scale=1", "name": "viewport"} in [a for _, a in page.tags]
    inside = [a.get("class") for tag, a in page.tags if tag == "div"]
    assert inside.count("scroll") == 2  # what may be wider than a phone: the table and the picture


def test_equal_runs_give_equal_pages_without_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "first", steps(12))
    pages = [report([Path("runs/first")], Path(f"{k}.html"), pictures=False).read_text() for k in range(2)]
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0]
    assert "byol-fast report runs/first" in pages[0]


# ---- a run's numbers -----------------------------------------------------------------------------------------------


def test_summary_and_tables_show_the_metrics(tmp_path: Path) -> None:
    judged = [{"step": 0, "epoch": 0.0, "knn_top1": 0.25, "knn_top5": 0.5, "knn_k": 20, "knn_num_val": 100}]
    judged += [
        {"step": 30, "epoch": 3.0, "knn_num_val": 100, "knn_top1": 0.5, "knn_top5": 0.75, "knn_k": 20}
        | {"rankme": 31.5}
    ]
    judged += [
        {"step": 30, "epoch": 3.0, "knn_full_top1": 0.625, "knn_full_top5": 0.75, "knn_k": 20, "knn_num_val": 500}
    ]
    records = [judged[0], *steps(30, lr=0.1, tau=0.99, images_per_second=100.0, data_wait=0.02), *judged[1:]]
    folder = run_folder(tmp_path / "run", records)
    page = page_of(folder)
    loss = sum(4 / i for i in range(21, 31)) / 10
    assert f"Loss{loss:.4f}" in page.text
    assert "complete30 of 30 steps, 3 epochs" in page.text
    assert "kNN top-1 accuracy is 50.0%, 25.0 points above the untrained encoder (25.0%)" in page.text
    assert "kNN top-1, all images62.5%all 500 validation images; step 30" in page.text
    assert "kNN-20 top-150.0%step 30" in page.text
    assert "Healthy: the embedding std is 0.90" in page.text
    assert "19 s of steps" in page.text  # 30 steps of 64 images, 100 images a second
    by_step = {row[0]: row for row in page.rows if len(row) == 8}
    for record in (records[1], records[30]):
        row = by_step[str(record["step"])]
        assert row[2] == f"{record['loss']:.4g}"
        assert row[4] == f"{record['lr']:.4g}"
    assert ["30", "3", "50.0%", "75.0%", "31.5"] in page.rows
    assert by_step["30"][-1] == "2.0%"  # of the step waiting for data


def test_skipped_steps_corrupt_images_and_waiting_are_reported(tmp_path: Path) -> None:
    records = steps(20, data_wait=0.5)
    for i in (4, 9):
        records[i] |= {"loss": None, "embedding_std": None, "skipped": True}
    folder = run_folder(tmp_path / "run", records)
    bad = {"image": f"a/{HOSTILE}.jpg", "reason": "truncated", "batch_number": 3, "index": 1}
    (folder / "corrupt_images.jsonl").write_text(json.dumps(bad) + "\n")
    page = page_of(folder)
    assert "2 steps were skipped" in page.text
    assert "Steps waited for data 50% of the time" in page.text
    assert any(row[1:] == ["truncated", "3"] for row in page.rows)
    loss = next(c for c in re.findall(r"<svg.*?</svg>", (folder / "out.html").read_text()) if "<title>Loss" in c)
    assert {"loss", "skipped"} <= set(texts(svg(loss)))
    assert loss.count("<title>skipped: ") == 2


def test_unfinished_empty_and_damaged_runs_are_shown(tmp_path: Path) -> None:
    half = page_of(run_folder(tmp_path / "half", steps(12)))
    assert "40% done12 of 30 steps, 1.2 epochs" in half.text
    accumulated = page_of(run_folder(tmp_path / "accumulated", steps(7, per_epoch=5), grad_accum_steps=2))
    assert "47% done7 of 15 steps" in accumulated.text

    empty = page_of(run_folder(tmp_path / "empty", []))
    assert "not started" in empty.text
    assert "No step is recorded yet" in empty.text

    damaged = run_folder(tmp_path / "damaged", steps(12))
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:30]
    lines[6] = "\x00\x00"
    (damaged / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "lo']))
    (damaged / "config.json").write_text("{not json")
    page = page_of(damaged)
    assert "Left out: 3 damaged lines of metrics.jsonl (5, 7, 13)." in page.text
    assert "Left out: config.json, which could not be read" in page.text
    assert len(read_run(damaged).steps) == 10
    assert "Healthy" in page.text


def test_values_of_other_types_are_left_out_and_named(tmp_path: Path) -> None:
    records = steps(12, lr=0.1)
    records[3] |= {"loss": "high", "lr": [1]}
    records[5] |= {"lr": math.nan, "note": "mine"}
    records[7]["step"] = "8"
    records[9]["loss"] = 10**400
    folder = run_folder(tmp_path / "run", records)
    (folder / "environment.json").write_text('{"processes": "two", "gpu": ["a GPU"]}')
    (folder / "config.json").write_text('{"model": [1], "view1": 3}')
    (folder / "corrupt_images.jsonl").write_text('{"image": 3, "reason": null}\n')
    (folder / "eval").mkdir()
    dense = [[90, 8, 2], [7, 90, 3], [0, 40, 60]]
    evaluations: dict[str, Record] = {
        "types": {"top1_ci95": ["a", 1], "step": True, "classes": [1, 2], "baselines": "none"},
        "nested": {"per_class": [{"class": "cat"}, {"class": "dog", "accuracy": "x"}]},
        "dense": {"confusion": dense},
        "small": {
            "confusion": [[0, 1, 2], [1, 0, 2], [1, 1, 1]],
            "num_test": 9,
        },  # three by three, of an earlier version
        "deep": {"settings": "DEEP"},
    }
    for name, changes in evaluations.items():
        text = json.dumps(EVALUATION | changes).replace('"DEEP"', 200 * "[" + 200 * "]")
        (folder / "eval" / f"{name}.json").write_text(text)
    page = page_of(folder)
    for note in (
        "1 of the values of step in metrics.jsonl that are no numbers (step after 7)",
        "2 of the values of loss in metrics.jsonl that are no numbers (step 4, 10)",
        "2 of the values of lr in metrics.jsonl that are no numbers (step 4, 6)",
        "1 of the values of note in metrics.jsonl that are no numbers (step 6)",
        'a field of environment.json: processes must be a whole number, got "two"',
        'a field of eval/types.json: top1_ci95[0] must be a number, got "a"',
        "a field of eval/types.json: step must be a whole number, got true",
        "a field of eval/types.json: classes[0] must be text, got 1",
        'a field of eval/types.json: baselines must be a list, got "none"',
        'a field of eval/nested.json: per_class[1].accuracy must be a number, got "x"',
        "deep.json, which could not be read (it must be a JSON object of at most 100 levels)",
    ):
        assert f"Left out: {note}." in page.text
    assert page.text.count("The confusion matrix is left out: it was written by an earlier version.") == 3
    assert page.text.count("80.0%") >= 4  # the accuracy of each evaluation
    assert "Healthy: the embedding std is 0.90" in page.text
    assert page_of(folder, folder).headings[0] == "2 runs"


def test_options_of_another_version_are_shown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(3))
    values = json.loads((folder / "config.json").read_text()) | {"from_the_future": 7}
    (folder / "config.json").write_text(json.dumps(values))
    page = page_of(folder)
    assert ["from_the_future", "7"] in page.rows
    assert "belongs to another version" in page.text


def test_options_start_with_differences_from_the_recipe(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run", steps(3), **{"optim.lr": 0.7}))
    differing = next(i for i, row in enumerate(page.rows) if row[:2] == ["option", "this run"])
    assert ["optim.lr", "0.7", "1.0"] in page.rows[differing:]
    assert ["epochs", "3", "1000"] in page.rows[differing:]
    assert ["optim.lr", "0.7"] in page.rows  # among all options
    assert ["optim.trust_coefficient", "0.02", "0.02"] not in page.rows


def test_resumes_are_counted_by_tensorboard_files(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(3))
    (folder / "tb").mkdir()
    for stamp in (1_760_000_000, 1_760_086_400, 1_760_172_800):
        (folder / "tb" / f"events.out.tfevents.{stamp}.secret-host.1.0").touch()
    page = page_of(folder)
    assert "resumed 2 times" in page.text
    assert "secret-host" not in page.text


EVALUATION: Record = {
    "protocol": "linear on cached features",
    "encoder": "run",
    "step": 30,
    "num_train": 1000,
    "num_test": 300,
    "classes": ["cat", f"dog{HOSTILE}", "fish"],
    "top1": 0.8,
    "top1_ci95": [0.75, 0.84],
    "top5": 1.0,
    "baselines": [{"name": "raw pixels", "top1": 0.4, "top1_ci95": [0.35, 0.45]}, {"name": "untrained", "top1": 0.5}],
    "per_class": [
        {"class": "cat", "count": 100, "accuracy": 0.9, "ci95": [0.8, 0.95]},
        {"class": "fish", "count": 100, "accuracy": 0.6, "ci95": [0.5, 0.7]},
    ],
    "confusion": [[0, 0, 90], [0, 1, 8], [0, 2, 2], [1, 0, 7], [1, 1, 90], [1, 2, 3], [2, 1, 40], [2, 2, 60]],
    "curve": [{"x": 0.001, "top1": 0.7}, {"x": 0.1, "top1": 0.8}, {"x": 10.0, "top1": 0.75}],
    "curve_label": "weight decay",
    "settings": {"epochs": 100, "nested": {"a": [1, 2]}},
}


def test_evaluations_are_shown_with_baselines(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(30))
    (folder / "eval").mkdir()
    (folder / "eval" / "linear.json").write_text(json.dumps(EVALUATION))
    (folder / "eval" / "broken.json").write_text("[1, 2")
    (folder / "eval" / "poor.json").write_text('{"top1": null, "confusion": [[1]], "per_class": [3], "curve": null}')
    page = page_of(folder)
    assert {"Evaluation: linear", "Evaluation: poor"} <= set(page.headings)
    assert "80.0%95 %: 75.0% to 84.0%" in page.text
    assert "broken.json, which could not be read" in page.text
    assert "is below the baseline" not in page.text
    confused = next(i for i, row in enumerate(page.rows) if row[:2] == ["true class", "predicted class"])
    assert page.rows[confused + 1][0] == "fish"
    assert page.rows[confused + 1][2:] == ["40", "40.0%"]
    assert ["fish", "100", "60.0%", "50.0% to 70.0%"] in page.rows
    assert ["settings.nested.a", "[1, 2]"] in page.rows
    charts = [texts(svg(c)) for c in re.findall(r"<svg.*?</svg>", (folder / "out.html").read_text(), re.DOTALL)]
    baselines = next(c for c in charts if "Compared with its baselines" in c)
    assert {"raw pixels", "untrained", "this encoder", "40.0%", "50.0%", "80.0%"} <= set(baselines)


def test_shots_and_retrieval_are_shown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps(3))
    (folder / "eval").mkdir()
    (folder / "eval" / "knn.json").write_text(json.dumps(EVALUATION | {"shots": SHOTS}))
    (folder / "eval" / "retrieval.json").write_text(json.dumps(RETRIEVAL))
    page = page_of(folder)
    assert ["5", "this encoder", "52.0%", "20.0% to 60.0%", "10.0%", "70.0%"] in page.rows
    assert not [row for row in page.rows if row[:2] == ["1", "raw pixels"]]
    assert ["this encoder", "mAP", "36.0%", "30.0% to 40.0%"] in page.rows
    assert ["this encoder", "recall at 5", "81.0%", ""] in page.rows
    assert ["raw pixels", "mAP", "47.0%", "45.0% to 50.0%"] in page.rows
    assert "2 of 70 images are no queries" in page.text
    assert "eval retrieval mAP36.0%95 %: 30.0% to 40.0%; 70 images" in page.text  # in the summary
    assert page.text.count("retrieval: 36.0% is below the baseline raw pixels, 47.0%.") == 2  # in the summary, too
    rows = page_of(folder, folder).rows
    assert ["knn", "top-1", "80.0%", "75.0% to 84.0%", "300"] in [row[1:] for row in rows]
    assert ["knn, 5 training images per class", "top-1", "52.0%", "20.0% to 60.0%", "300"] in [row[1:] for row in rows]
    assert ["retrieval", "mAP", "36.0%", "30.0% to 40.0%", "70"] in [row[1:] for row in rows]


def test_several_runs_share_charts_and_tables(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", steps(30))
    b = run_folder(tmp_path / "b", steps(12, std=0.1), **{"optim.lr": 0.5})
    page = page_of(a, b)
    assert ["option", "a", "b"] in page.rows
    assert ["optim.lr", "1.0", "0.5"] in page.rows
    assert not [row for row in page.rows if row[0] == "optim.trust_coefficient"]
    loss = next(c for c in re.findall(r"<svg.*?</svg>", (a / "out.html").read_text()) if "<title>Loss" in c)
    assert {"a", "b", "epoch"} <= set(texts(svg(loss)))


def test_wrong_arguments_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="must be a run folder"):
        report([tmp_path])
    folder = run_folder(tmp_path / "run", steps(3))
    with pytest.raises(ConfigError, match=r"must be a file that ends in \.html"):
        report([folder], tmp_path / "x.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"report: .*x\.html cannot be written"):
        report([folder], tmp_path / "file" / "x.html", pictures=False)
    with pytest.raises(SystemExit) as ended:
        main.main(["report", str(folder), "--no-images", "--output", str(tmp_path / "deep" / "page.html")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "deep" / "page.html")


# ---- what needs images ---------------------------------------------------------------------------------------------


def test_run_writes_its_report_and_the_command_adds_pictures(tiny: Config, npz: Path) -> None:
    result = byol_fast.pretrain(recipe=configs.replace(tiny, {"data.on_corrupt": "skip", "steps": 2}))
    first = read((result.run_dir / "report.html").read_text())
    assert f"Loss{result.loss:.4f}" in first.text
    assert "Views" not in first.headings
    (result.run_dir / "metrics.jsonl").write_text("")  # no curves to draw in the pages below

    page = read(report([result.run_dir], num=50).read_text())
    assert {"Views", "Nearest neighbors", "Map of the features"} <= set(page.headings)
    assert "Left out" not in page.text
    assert "50 training images, features of step 2" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2

    moved = npz.rename(npz.with_name("elsewhere.npz"))
    without = read(report([result.run_dir], num=50).read_text())
    assert "Views, neighbors and map are left out" in without.text
    assert "--images FOLDER" in without.text
    assert not any(tag == "img" for tag, _ in without.tags)
    again = read(report([result.run_dir], images=moved, num=20).read_text())
    assert {"Views", "Nearest neighbors", "Map of the features"} <= set(again.headings)


def test_run_without_encoder_has_views_only(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run", []), pictures=True)
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "Neighbors and map are left out" in page.text


def test_unwritable_report_does_not_fail_the_run(tiny: Config, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(configs.replace(tiny, {"steps": 2}), callbacks=[ReportCallback()])
    (trainer.run_dir / "report.html").mkdir(parents=True)
    assert trainer.fit().steps == 2
    assert "no report.html" in caplog.text
