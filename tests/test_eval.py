"""Evaluations as a whole, of tiny encoders on tiny images."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
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
from byol_fast.evaluate import Subject, evaluate_finetune, evaluate_knn, evaluate_linear
from byol_fast.evaluate.finetune import DivergedError
from byol_fast.evaluate.splits import balanced_subset
from byol_fast.utils.progress import Progress

SIZE = 12
CLASSES = ("red", "green", "blue")
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1}
QUICK: dict[str, dict[str, Any]] = {
    "linear": {"protocol": "fast", "l2": (1e-3, 1e-1), **CPU},
    "linear_reference": {"protocol": "reference", "lr": (0.4, 0.1), "epochs": 4, "batch_size": 16, **CPU},
    "finetune": {"labels": (0.5,), "lr": (0.1, 0.02), "epochs": (3,), "batch_size": 16, **CPU},
}


def planted(count: int, seed: int, noise: float = 60.0) -> ImageSource:
    """Noise, a little stronger in the channel that is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    values = 110 + noise * rng.normal(size=(count, SIZE, SIZE, 3))
    values[np.arange(count), :, :, labels] += 40
    images = np.clip(values, 0, 255).astype(np.uint8)
    return array_source(images, labels, CLASSES, arg_name="images")


class Watched(nn.Sequential):
    """An encoder that remembers in which mode, and with which statistics, it and its copies ran."""

    ran: ClassVar[list[tuple[bool, Tensor]]] = []

    def forward(self, x: Tensor) -> Tensor:
        norm = self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        self.ran.append((norm.training, norm.running_mean.clone()))
        result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return result


def network() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return Watched(*layers)


@pytest.fixture
def subject() -> Iterator[Subject]:
    torch.manual_seed(0)
    encoder = network()
    with torch.no_grad():
        encoder(torch.randn(64, 3, SIZE, SIZE) * 2)  # statistics of their own
    Watched.ran.clear()
    yield Subject(name="tiny", encoder=encoder.eval(), image_size=SIZE, fresh=network)
    Watched.ran.clear()


def run(protocol: str, *arguments: object, **options: Any) -> Any:
    """The evaluation of a protocol, the only one of fine-tuning."""
    if protocol == "knn":
        return evaluate_knn(*arguments, **(CPU | options))  # type: ignore[arg-type]
    if protocol.startswith("linear"):
        return evaluate_linear(*arguments, **(QUICK[protocol] | options))  # type: ignore[arg-type]
    return evaluate_finetune(*arguments, **(QUICK[protocol] | options))[-1]  # type: ignore[arg-type]


PROTOCOLS = ("knn", "linear", "linear_reference", "finetune")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_finds_what_is_planted_and_leaves_the_encoder_as_it_was(protocol: str, subject: Subject) -> None:
    before = {name: value.clone() for name, value in subject.encoder.state_dict().items()}
    more = {"labels": (1.0,), "epochs": (10,)} if protocol == "finetune" else {}
    found = run(protocol, subject, planted(120, 0), planted(60, 1), baselines=True, **more)
    assert found.top1 > 0.9
    assert found.scores.confusion.sum() == found.num_test == 60
    assert found.scores.confusion.sum(axis=1).tolist() == [20, 20, 20]
    low, high = found.scores.top1_ci95
    assert low < found.top1 <= high
    assert all(torch.equal(value, before[name]) for name, value in subject.encoder.state_dict().items())
    names = [baseline.name for baseline in found.baselines]
    if protocol == "finetune":
        assert names == ["from scratch"]
        assert any(training for training, _ in Watched.ran)
    else:
        pixels = [] if protocol == "linear_reference" else ["raw pixels (12 px)"]
        assert names == ["untrained, calibrated", *pixels]


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_reference"])
def test_the_encoder_is_frozen_with_its_norms(protocol: str, subject: Subject) -> None:
    run(protocol, subject, planted(60, 0), planted(30, 1))
    norm = subject.encoder[1]  # type: ignore[index]
    assert Watched.ran
    assert all(not training and torch.equal(mean, norm.running_mean) for training, mean in Watched.ran)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_test_labels_choose_nothing(protocol: str, subject: Subject) -> None:
    """With other test labels the same classifier guesses the same."""
    train, test = planted(90, 0, noise=250.0), planted(60, 1, noise=250.0)
    assert test.labels is not None
    other = test.with_labels((test.labels + 1) % 3, test.classes)
    first, second = (run(protocol, subject, train, images) for images in (test, other))
    assert first.chosen == second.chosen
    guesses = [e.scores.confusion.sum(axis=0).tolist() for e in (first, second)]
    assert guesses[0] == guesses[1]
    np.testing.assert_array_equal(np.roll(first.scores.confusion, 1, axis=0), second.scores.confusion)
    if protocol.startswith("linear"):
        assert first.curve == second.curve


def test_finetuning_sees_the_chosen_labels_and_no_others(subject: Subject) -> None:
    train, test = planted(90, 0), planted(30, 1)
    assert train.labels is not None
    chosen = balanced_subset(train.labels, 0.2, seed=5)
    images: NDArray[np.uint8] = train.images.copy()  # type: ignore[attr-defined]
    images[np.setdiff1d(np.arange(90), chosen)] = 0
    others_black = array_source(images, train.labels, CLASSES, arg_name="images")
    options = {"labels": (0.2,), "lr": (0.1, 0.05), "seed": 5}
    first, second = (run("finetune", subject, source, test, **options) for source in (train, others_black))
    assert first.num_train == len(chosen) == 18
    assert first.chosen == second.chosen
    assert first.curve == second.curve
    np.testing.assert_array_equal(first.scores.confusion, second.scores.confusion)


def test_finetuning_reports_each_share_of_the_labels(subject: Subject, tmp_path: Path) -> None:
    options = QUICK["finetune"] | {"labels": (0.1, 1.0), "lr": (0.1,), "to": tmp_path}
    few, all_ = evaluate_finetune(subject, planted(120, 0), planted(30, 1), **options)
    assert (few.protocol, all_.protocol) == ("finetune_10pct", "finetune_100pct")
    assert (few.num_train, all_.num_train) == (12, 120)
    assert few.chosen["num_held_out"] == 0
    assert [x for x, _ in all_.curve] == [1, 2, 3]
    assert {p.name for p in tmp_path.glob("*.json")} == {"finetune_10pct.json", "finetune_100pct.json"}


def test_a_rate_that_diverges_loses_and_alone_is_an_error(subject: Subject) -> None:
    images = planted(60, 0), planted(30, 1)
    found = run("finetune", subject, *images, lr=(1e30, 0.1))
    assert found.chosen["lr"] == 0.1
    assert found.chosen["tried"][1]["top1_held_out"] == 0
    with pytest.raises(DivergedError, match="smaller --lr"):
        run("finetune", subject, *images, lr=(1e30,))


def test_the_first_k_counts_not_the_best(subject: Subject) -> None:
    images = planted(90, 0, noise=250.0), planted(60, 1, noise=250.0)
    found = evaluate_knn(subject, *images, k=(1, 5, 40), **CPU)
    curve = dict(found.curve)
    assert set(curve) == {1, 5, 40}
    assert found.top1 == curve[1]
    assert found.top1 == evaluate_knn(subject, *images, k=(1,), **CPU).top1
    assert curve[40] == evaluate_knn(subject, *images, k=(40,), **CPU).top1


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
        (lambda a, _: (a, a, {}), "must be others than the training images"),
        (lambda a, b: (a, b, {"k": (31,)}), "k must be at most the number of training images, 30, got 31"),
        (lambda a, b: (a, b, {"k": (0,)}), "k must be positive numbers"),
        (lambda a, b: (a, b, {"k": 5}), "k must be of type tuple"),
        (lambda a, b: (a, b, {"temperature": 0.0}), "temperature must be positive"),
        (lambda a, b: (a, b, {"temprature": 1.0}), "did you mean 'temperature'"),
        (lambda a, _: (a, None, {}), "there must be images to test on.*--test"),
        (lambda _, __: (None, None, {}), "give --train FOLDER and --test FOLDER"),
    ],
)
def test_what_does_not_fit_is_explained(change: Any, message: str, subject: Subject) -> None:
    train, test, options = change(planted(30, 0), planted(15, 1))
    with pytest.raises(ValueError, match=message):
        evaluate_knn(subject, train, test, **(CPU | options))


def test_classes_are_matched_by_name_and_may_be_absent_from_the_test(
    subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = planted(90, 0), planted(60, 1)
    assert test.labels is not None
    straight = evaluate_knn(subject, train, test, **CPU)
    turned = test.with_labels(2 - test.labels, CLASSES[::-1])
    np.testing.assert_array_equal(
        evaluate_knn(subject, train, turned, **CPU).scores.confusion, straight.scores.confusion
    )
    assert not caplog.records
    two = evaluate_knn(subject, train, test.subset(np.flatnonzero(test.labels < 2)), **CPU)
    assert "1 of 3 classes have no test images (such as blue)" in caplog.text
    assert two.to_dict()["per_class"][2] == {"class": "blue", "count": 0, "accuracy": None, "ci95": [0.0, 1.0]}


def test_an_encoder_whose_features_are_not_finite_is_refused(subject: Subject) -> None:
    broken = dataclasses.replace(subject, encoder=nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4)))
    nn.init.constant_(broken.encoder[1].bias, float("nan"))  # type: ignore[index]
    with pytest.raises(ValueError, match="features of tiny must be finite"):
        evaluate_knn(broken, planted(30, 0), planted(15, 1), **CPU)


def test_no_baseline_of_a_network_that_nobody_can_make_anew(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"set Subject\.fresh"):
        evaluate_knn(dataclasses.replace(subject, fresh=None), planted(30, 0), planted(15, 1), baselines=True, **CPU)


# ---- files --------------------------------------------------------------------------------------------------------


def test_an_interruption_leaves_what_was_there(subject: Subject, tmp_path: Path) -> None:
    class Impatient(Progress):
        def over(self, batches: Any, total: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
            if "test images" in what:
                raise KeyboardInterrupt
            return super().over(batches, total, what)

    images = planted(60, 0), planted(30, 1)
    run("linear", subject, *images, to=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} >= {"linear.json", "linear.svg", "linear_confusion.svg", "linear_curve.svg"}
    with pytest.raises(KeyboardInterrupt):
        run("linear", subject, *images, to=tmp_path, l2=(1e-2,), progress=Impatient())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run("linear", subject, *images, to=tmp_path, l2=(1e-2,))
    assert not (tmp_path / "linear_curve.svg").exists()  # it belonged to the sweep


def test_an_earlier_record_of_something_else_is_kept(subject: Subject, tmp_path: Path) -> None:
    kept = []
    for count in (30, 30, 21, 30):
        evaluate_knn(subject, planted(60, 0), planted(count, 1), to=tmp_path, **CPU)
        kept.append(len(list(tmp_path.glob("earlier/*.json"))))
        assert json.loads((tmp_path / "knn.json").read_text())["num_test"] == count
    assert kept == [0, 0, 1, 2]  # a repetition replaces what it repeats
    tests = [json.loads((tmp_path / f"earlier/knn_{i}.json").read_text())["num_test"] for i in (1, 2)]
    assert tests == [30, 21]
    (tmp_path / "knn.json").write_bytes(b"\xff\xfe not ours")
    evaluate_knn(subject, planted(60, 0), planted(30, 1), to=tmp_path, **CPU)
    assert (tmp_path / "earlier/knn_3.json").read_bytes() == b"\xff\xfe not ours"


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder with --output"):
        run("knn", subject, planted(30, 0), planted(15, 1), to=tmp_path / "file")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on files with train and val, its kNN evaluated."""
    root = tmp_path_factory.mktemp("eval")
    for part, count, seed in (("train", 36, 0), ("val", 18, 1)):
        source = planted(count, seed)
        for i in range(count):
            assert source.labels is not None
            path = root / "images" / part / CLASSES[source.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.load(i).save(path)
    view = {"size": 16, "blur": 0.0}
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
            "tensorboard": False,
            "out": root,
            "name": "run",
        },
    )
    return Trainer(config).fit().run_dir


@pytest.mark.parametrize("protocol", ["knn", "linear", "finetune"])
def test_the_command_judges_a_run_on_its_own_images(
    protocol: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--baselines"]
    options += ["--labels", "0.5", "--epochs", "1", "--batch-size", "16"] if protocol == "finetune" else []
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", protocol, str(trained), *options])
    assert ended.value.code == 0
    name = "finetune_50pct" if protocol == "finetune" else protocol
    record = json.loads((trained / "eval" / f"{name}.json").read_text())
    shown = capsys.readouterr().out
    assert f"{record['top1']:.1%}" in shown
    assert record["protocol"] == name
    assert record["classes"] == sorted(CLASSES)
    assert record["step"] == 3
    assert (record["num_train"], record["num_test"]) == (18 if protocol == "finetune" else 36, 18)
    matrix = np.array(record["confusion"])
    assert matrix.sum() == 18
    assert record["top1"] == pytest.approx(np.trace(matrix) / 18)
    for row, entry in zip(matrix, record["per_class"], strict=True):
        assert entry["count"] == row.sum() == 6
    assert record["environment"]["precision"] == "fp32"
    pictures = sorted((trained / "eval").glob(f"{name}*.svg"))
    assert len(pictures) == (4 if protocol != "finetune" else 3)  # one epoch is no curve
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    if protocol == "knn":
        metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        during = [m["knn_top1"] for m in metrics if "knn_top1" in m]
        assert record["chosen"] == {"k": 3, "temperature": 0.2}
        assert record["top1"] == pytest.approx(during[-1], abs=1e-6)  # fp32 there


def test_the_command_takes_other_images_and_an_exported_encoder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("encoder.safetensors", "encoder.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    images = trained.parent / "images"
    common = ["--device", "cpu", "--precision", "fp32", "--k", "3", "--temperature", "0.2"]
    folders = ["--train", str(images / "train"), "--test", str(images / "val")]
    for encoder, chosen in ((tmp_path, folders), (tmp_path / "encoder.safetensors", ["--train", str(images)])):
        with pytest.raises(SystemExit) as ended:
            main.main(["eval", "knn", str(encoder), *chosen, *common])
        assert ended.value.code == 0
        found = json.loads((tmp_path / "eval" / "knn.json").read_text())
        own = json.loads((trained / "eval" / "knn.json").read_text()) if (trained / "eval").exists() else found
        assert found["confusion"] == own["confusion"]
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", "knn", str(tmp_path)])
    assert ended.value.code == 2
    assert "give --train FOLDER and --test FOLDER" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kn", "run"], "did you mean 'knn'"),
        (["runs/first"], "one of knn, linear, finetune comes first"),
        (["knn", "nowhere"], "nowhere does not exist"),
        (["linear", "nowhere", "--held-out", "0.9"], "held_out must be above 0, at most 0.5"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom byol_fast.cli import eval\n"
        "try:\n    eval.main(['finetune', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False).stdout
    assert "--labels" in shown
    assert "a smaller share is a part of a larger one" in " ".join(shown.replace("│", " ").split())
    assert shown.split()[-1] == "False"


def test_options_of_the_other_linear_protocol_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr must be left alone with protocol fast \(it belongs to reference\)"):
        LinearSettings(lr=(99.0,))
    with pytest.raises(ConfigError, match="flip must be left alone with protocol reference"):
        LinearSettings(protocol="reference", flip=True)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluate_knn(subject, planted(30, 0), planted(30, 1), k=(1,), to=tmp_path / "file")
    assert not Watched.ran
