"""Evaluations of tiny encoders on tiny images, and the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_fast import Trainer
from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, ConfigError
from byol_fast.config.evaluation import LinearSettings
from byol_fast.data import ImageSource
from byol_fast.data.sources import array_source
from byol_fast.evaluate import PretrainedEncoder, evaluate_finetune, evaluate_knn
from byol_fast.evaluate.finetune import DivergedError
from byol_fast.evaluate.splits import balanced_subset
from byol_fast.utils.progress import Progress
from tests.evaluate.helpers import CLASSES, CPU, PROTOCOLS, QUICK, SIZE, RecordingEncoder, labeled_images, matrix, run
from tests.networks import Steep


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_classes_are_separated_and_encoder_is_unchanged(protocol: str, pretrained: PretrainedEncoder) -> None:
    before = {name: value.clone() for name, value in pretrained.encoder.state_dict().items()}
    more = {"labels": (1.0,), "epochs": (10,), "lr": (0.1,)} if protocol == "finetune" else {}
    result = run(protocol, pretrained, labeled_images(120, 0), labeled_images(60, 1), baselines=True, **more)
    assert result.top1 > 0.9
    assert result.num_test == 60
    assert matrix(result.scores.confusion).sum(axis=1).tolist() == [20, 20, 20]
    low, high = result.scores.top1_ci95
    assert low < result.top1 <= high
    assert all(torch.equal(value, before[name]) for name, value in pretrained.encoder.state_dict().items())
    names = [baseline.name for baseline in result.baselines]
    if protocol == "finetune":
        assert names == ["from scratch"]
        assert any(training for training, _ in RecordingEncoder.calls)
    else:
        pixels = [] if protocol == "linear_reference" else ["raw pixels (12 px)"]
        assert names == ["untrained, calibrated", *pixels]


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_reference"])
def test_encoder_and_bn_statistics_are_frozen(protocol: str, pretrained: PretrainedEncoder) -> None:
    run(protocol, pretrained, labeled_images(60, 0), labeled_images(30, 1))
    norm = pretrained.encoder[1]  # type: ignore[index]
    assert RecordingEncoder.calls
    assert all(not training and torch.equal(mean, norm.running_mean) for training, mean in RecordingEncoder.calls)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_test_labels_are_not_used_for_selection(protocol: str, pretrained: PretrainedEncoder) -> None:
    """Other test labels do not change predictions or hyperparameters."""
    train, test = labeled_images(90, 0, noise=250.0), labeled_images(60, 1, noise=250.0)
    assert test.labels is not None
    other = test.with_labels((test.labels + 1) % 3, test.classes)
    first, second = (run(protocol, pretrained, train, images) for images in (test, other))
    assert first.chosen == second.chosen
    with_labels, with_others = (matrix(e.scores.confusion) for e in (first, second))
    np.testing.assert_array_equal(np.roll(with_labels, 1, axis=0), with_others)  # the same predictions
    if protocol.startswith("linear"):
        assert first.curve == second.curve


def test_finetuning_uses_only_selected_images(pretrained: PretrainedEncoder) -> None:
    train, test = labeled_images(90, 0), labeled_images(30, 1)
    assert train.labels is not None
    selected = balanced_subset(train.labels, 0.2, seed=5)
    images: NDArray[np.uint8] = train.images.copy()  # type: ignore[attr-defined]
    images[np.setdiff1d(np.arange(90), selected)] = 0
    others_are_black = array_source(images, train.labels, CLASSES, arg_name="images")
    options = {"labels": (0.2,), "lr": (0.1, 0.05), "seed": 5}
    first, second = (run("finetune", pretrained, source, test, **options) for source in (train, others_are_black))
    assert first.num_train == len(selected) == 18
    assert first.chosen == second.chosen
    assert first.curve == second.curve
    np.testing.assert_array_equal(first.scores.confusion, second.scores.confusion)


def test_finetuning_returns_result_per_share(pretrained: PretrainedEncoder, tmp_path: Path) -> None:
    options = QUICK["finetune"] | {"labels": (0.1, 1.0), "lr": (0.1,), "output_dir": tmp_path}
    few, all_ = evaluate_finetune(pretrained, labeled_images(120, 0), labeled_images(30, 1), **options)
    assert (few.protocol, all_.protocol) == ("finetune_10pct", "finetune_100pct")
    assert (few.num_train, all_.num_train) == (12, 120)
    assert few.chosen["num_held_out"] == 0
    assert [x for x, _ in all_.curve] == [1, 2, 3]
    assert {p.name for p in tmp_path.glob("*.json")} == {"finetune_10pct.json", "finetune_100pct.json"}


def test_diverged_candidate_is_not_selected(pretrained: PretrainedEncoder) -> None:
    images = labeled_images(60, 0), labeled_images(30, 1)
    steep = dataclasses.replace(pretrained, encoder=nn.Sequential(pretrained.encoder, Steep()))
    result = run("finetune", steep, *images, lr=(1e4, 0.1))
    assert result.chosen["lr"] == 0.1
    assert result.chosen["tried"][1]["top1_held_out"] == 0
    with pytest.raises(DivergedError, match="smaller --lr"):
        run("finetune", steep, *images, lr=(1e4,))


def test_knn_result_is_that_of_first_k(pretrained: PretrainedEncoder) -> None:
    images = labeled_images(90, 0, noise=250.0), labeled_images(60, 1, noise=250.0)
    result = evaluate_knn(pretrained, *images, k=(1, 5, 40), **CPU)
    curve = dict(result.curve)
    assert set(curve) == {1, 5, 40}
    assert result.top1 == curve[1]
    assert result.top1 == evaluate_knn(pretrained, *images, k=(1,), **CPU).top1
    assert curve[40] == evaluate_knn(pretrained, *images, k=(40,), **CPU).top1


# ---- images that do not fit ---------------------------------------------------------------------------------------


def with_labels(
    source: ImageSource, labels: NDArray[np.int64] | None, classes: tuple[str, ...] = CLASSES
) -> ImageSource:
    return source.with_labels(labels, classes if labels is not None else ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (with_labels(a, None), b, {}), "the training images must have labels"),
        (lambda a, b: (a, with_labels(b, None), {}), "the test images must have labels"),
        (lambda a, b: (a, b.with_labels(b.labels, ("red", "green", "pink")), {}), "1 of 3 are not.*such as pink"),
        (lambda a, b: (with_labels(a, np.where(a.labels == 2, 1, a.labels)), b, {}), "such as blue"),
        (lambda a, b: (with_labels(a, 0 * a.labels), with_labels(b, 0 * b.labels), {}), "two classes or more"),
        (lambda a, _: (a, a, {}), "must differ from the training images"),
        (lambda a, b: (a, b, {"k": (31,)}), "k must be at most the number of training images, 30, got 31"),
        (lambda a, b: (a, b, {"k": (0,)}), "k must be an integer from 1 to 10,000, got 0"),
        (lambda a, b: (a, b, {"k": 5}), "k must be a tuple of at most 10,000 values, got 5"),
        (lambda a, b: (a, b, {"temperature": 0.0}), "temperature must be a number from 0.0001 to 10000, got 0"),
        (lambda a, b: (a, b, {"temprature": 1.0}), "did you mean 'temperature'"),
        (lambda a, _: (a, None, {}), "have no test images beside them; pass --test"),
        (lambda _, __: (None, None, {}), "give --train FOLDER and --test FOLDER"),
    ],
)
def test_invalid_images_and_settings_are_refused(change: Any, message: str, pretrained: PretrainedEncoder) -> None:
    train, test, options = change(labeled_images(30, 0), labeled_images(15, 1))
    with pytest.raises(ValueError, match=message):
        evaluate_knn(pretrained, train, test, **(CPU | options))


def test_classes_are_matched_by_name(pretrained: PretrainedEncoder, caplog: pytest.LogCaptureFixture) -> None:
    train, test = labeled_images(90, 0), labeled_images(60, 1)
    assert test.labels is not None
    expected = evaluate_knn(pretrained, train, test, **CPU)
    renumbered = test.with_labels(2 - test.labels, CLASSES[::-1])
    np.testing.assert_array_equal(
        evaluate_knn(pretrained, train, renumbered, **CPU).scores.confusion, expected.scores.confusion
    )
    assert not caplog.records
    two_classes = evaluate_knn(pretrained, train, test.subset(np.flatnonzero(test.labels < 2)), **CPU)
    assert "1 of 3 classes have no test images (such as blue)" in caplog.text
    assert two_classes.to_dict()["per_class"][2] == {"class": "blue", "count": 0, "accuracy": None, "ci95": [0.0, 1.0]}


def test_nonfinite_features_are_refused(pretrained: PretrainedEncoder) -> None:
    broken = dataclasses.replace(pretrained, encoder=nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4)))
    nn.init.constant_(broken.encoder[1].bias, float("nan"))  # type: ignore[index]
    with pytest.raises(ValueError, match="features of tiny must be finite"):
        evaluate_knn(broken, labeled_images(30, 0), labeled_images(15, 1), **CPU)


def test_untrained_baseline_needs_init_fn(pretrained: PretrainedEncoder) -> None:
    without_init_fn = dataclasses.replace(pretrained, init_fn=None)
    with pytest.raises(ValueError, match=r"no untrained baseline for tiny: pass PretrainedEncoder\.init_fn"):
        evaluate_knn(without_init_fn, labeled_images(30, 0), labeled_images(15, 1), baselines=True, **CPU)


# ---- files --------------------------------------------------------------------------------------------------------


def test_interruption_keeps_earlier_record(pretrained: PretrainedEncoder, tmp_path: Path) -> None:
    class Interrupting(Progress):
        def track(self, batches: Any, total: int, description: str) -> Iterator[tuple[Tensor, Tensor]]:
            if "test images" in description:
                raise KeyboardInterrupt
            return super().track(batches, total, description)

    images = labeled_images(60, 0), labeled_images(30, 1)
    run("linear", pretrained, *images, output_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [path.name for path in before] == ["linear.json"]
    with pytest.raises(KeyboardInterrupt):
        run("linear", pretrained, *images, output_dir=tmp_path, l2=(1e-2,), progress=Interrupting())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_earlier_record_of_other_images_is_kept(pretrained: PretrainedEncoder, tmp_path: Path) -> None:
    num_kept = []
    for count in (30, 30, 21, 30):
        evaluate_knn(pretrained, labeled_images(60, 0), labeled_images(count, 1), output_dir=tmp_path, **CPU)
        num_kept.append(len(list(tmp_path.glob("earlier/*.json"))))
        assert json.loads((tmp_path / "knn.json").read_text())["num_test"] == count
    assert num_kept == [0, 0, 1, 2]  # a repetition replaces its record
    tests = [json.loads((tmp_path / f"earlier/knn_{i}.json").read_text())["num_test"] for i in (1, 2)]
    assert tests == [30, 21]
    (tmp_path / "knn.json").write_bytes(b"\xff\xfe not ours")
    evaluate_knn(pretrained, labeled_images(60, 0), labeled_images(30, 1), output_dir=tmp_path, **CPU)
    assert (tmp_path / "earlier/knn_3.json").read_bytes() == b"\xff\xfe not ours"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on folders train and val, with kNN evaluation."""
    root = tmp_path_factory.mktemp("eval")
    for part, count, seed in (("train", 36, 0), ("val", 18, 1)):
        source = labeled_images(count, seed)
        for i in range(count):
            assert source.labels is not None
            path = root / "images" / part / CLASSES[source.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.load(i).save(path)
    view = {"size": 16, "blur_p": 0.0}
    config = configs.replace(
        Config(),
        {
            "data": {"root": root / "images", "threads": 1},
            "view1": view,
            "view2": view,
            "model": {"encoder": "resnet18_narrow", "hidden_dim": 16, "projection_dim": 8},
            "optim": {"name": "sgd", "lr": 0.1},
            "knn": {"k": 3, "temperature": 0.2},
            "batch_size": 12,
            "steps": 3,
            "device": "cpu",
            "precision": "fp32",
            "log": (),
            "memory_check": False,
            "out": root,
            "name": "run",
        },
    )
    return Trainer(config).fit().run_dir


def test_command_evaluates_retrieval_among_validation_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", "retrieval", str(trained), "--device", "cpu", "--threads", "1"])
    assert ended.value.code == 0
    record = json.loads((trained / "eval" / "retrieval.json").read_text())
    assert (record["step"], record["num_test"], record["num_queries"], record["num_left_out"]) == (3, 18, 18, 0)
    printed = capsys.readouterr().out
    assert all(f"{share:.1%}" in printed for share in (record["mean_ap"], *(r["recall"] for r in record["recall"])))
    assert [path.name for path in (trained / "eval").glob("retrieval*.svg")] == ["retrieval.svg"]
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", "retrieval", str(trained), "--train", "x"])
    assert ended.value.code == 2
    assert "--train" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["knn", "linear", "finetune"])
def test_command_evaluates_run_on_its_images(protocol: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--baselines"]
    options += ["--labels", "0.5", "--epochs", "1", "--batch-size", "16"] if protocol == "finetune" else []
    options += ["--shots", "1", "5"] if protocol == "knn" else []
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", protocol, str(trained), *options])
    assert ended.value.code == 0
    name = "finetune_50pct" if protocol == "finetune" else protocol
    record = json.loads((trained / "eval" / f"{name}.json").read_text())
    printed = capsys.readouterr().out
    assert f"{record['top1']:.1%}" in printed
    assert record["protocol"] == name
    assert record["classes"] == sorted(CLASSES)
    assert record["step"] == 3
    assert (record["num_train"], record["num_test"]) == (18 if protocol == "finetune" else 36, 18)
    confusion = matrix(record["confusion"])
    assert confusion.sum() == 18
    assert record["top1"] == pytest.approx(np.trace(confusion) / 18)
    for row, entry in zip(confusion, record["per_class"], strict=True):
        assert entry["count"] == row.sum() == 6
    assert record["environment"]["precision"] == "fp32"
    charts = sorted((trained / "eval").glob(f"{name}*.svg"))
    assert len(charts) == {"knn": 5, "linear": 4, "finetune": 3}[protocol]  # no curve of a single epoch
    for chart in charts:
        assert ElementTree.parse(chart).getroot().tag.endswith("svg")
    if protocol == "knn":
        metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        during = [m["knn_top1"] for m in metrics if "knn_top1" in m]
        assert record["chosen"] == {"k": 3, "temperature": 0.2}
        assert record["top1"] == pytest.approx(during[-1], abs=1e-6)  # the mean is fp32 there
        assert [(row["shots"], row["k"]) for row in record["shots"]] == 3 * [(1, 1), (5, 3)]
        assert all(f"{row[key]:.1%}" in printed for row in record["shots"] for key in ("top1", "lowest", "highest"))


def test_command_evaluates_exported_encoder_on_other_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("encoder.safetensors", "encoder.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    images = trained.parent / "images"
    common = ["--device", "cpu", "--precision", "fp32", "--k", "3", "--temperature", "0.2"]
    folders = ["--train", str(images / "train"), "--test", str(images / "val")]
    for encoder, options in ((tmp_path, folders), (tmp_path / "encoder.safetensors", ["--train", str(images)])):
        with pytest.raises(SystemExit) as ended:
            main.main(["eval", "knn", str(encoder), *options, *common])
        assert ended.value.code == 0
        result = json.loads((tmp_path / "eval" / "knn.json").read_text())
        own = json.loads((trained / "eval" / "knn.json").read_text()) if (trained / "eval").exists() else result
        assert result["confusion"] == own["confusion"]
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", "knn", str(tmp_path)])
    assert ended.value.code == 2
    assert "give --train FOLDER and --test FOLDER" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kn", "run"], "did you mean 'knn'"),
        (["runs/first"], "one of knn, linear, finetune, retrieval comes first"),
        (["knn", "nowhere"], "nowhere does not exist"),
        (["linear", "nowhere", "--held-out", "0.9"], "held_out must be a number from 1e-06 to 0.5"),
    ],
)
def test_invalid_commands_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom byol_fast.cli import eval\n"
        "try:\n    eval.main(['finetune', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False).stdout
    assert "--labels" in shown
    assert "a smaller share is a subset of a larger one" in " ".join(shown.replace("│", " ").split())
    assert shown.split()[-1] == "False"


def test_options_of_other_linear_protocol_are_refused() -> None:
    with pytest.raises(ConfigError, match="lr must be left at its default with protocol fast"):
        LinearSettings(lr=(99.0,))
    with pytest.raises(ConfigError, match="flip must be left at its default with protocol reference"):
        LinearSettings(protocol="reference", flip=True)


def test_unwritable_folder_is_refused_before_work(pretrained: PretrainedEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written .*choose another folder with --output"):
        evaluate_knn(pretrained, labeled_images(30, 0), labeled_images(30, 1), k=(1,), output_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="k must be at most"):  # nothing is left where nothing is written
        evaluate_knn(pretrained, labeled_images(30, 0), labeled_images(30, 1), k=(31,), output_dir=tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not RecordingEncoder.calls
