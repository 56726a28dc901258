"""Speed runs: what is logged, what counts as time, and runs that are cut and continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from byol_fast import config as configs
from byol_fast.bench import speed_log, speed_run
from byol_fast.bench.published import CIFAR10_KNN, THRESHOLDS
from byol_fast.bench.speed_images import Images
from byol_fast.bench.speed_log import SpeedLog, read_log
from byol_fast.bench.speed_plan import SpeedPlan, speed_run_config
from byol_fast.bench.speed_run import train_all
from byol_fast.cli import bench_cifar10
from byol_fast.config import ConfigError, recipes
from byol_fast.data import SourceError
from byol_fast.training.callbacks import Callback
from byol_fast.training.errors import Interrupted
from byol_fast.training.resume import config_digest
from byol_fast.training.train_step import StepOutput
from byol_fast.training.trainer import Trainer
from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.files import atomic_write
from byol_fast.utils.intervals import wilson_interval
from tests.conftest import real_data

EPOCH = 8
"""Steps of an epoch."""
OPTIONS = {
    "--epochs": "2",
    "--batch-size": "32",
    "--image-size": "16",
    "--model.encoder": "resnet18_narrow",
    "--model.hidden-dim": "32",
    "--model.projection-dim": "16",
    "--optim.lr": "0.2",
    "--device": "cpu",
    "--precision": "fp32",
    "--data.threads": "1",
}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four classes, 256 for training and 128 for validation: stripes of two directions and two widths."""
    generator = np.random.default_rng(0)

    def images(labels: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[:32, :32]
        waves = [np.sin((x if c % 2 else y) * (0.4 if c < 2 else 1.0) + generator.uniform(0, 6)) for c in labels]
        values = 127 + 90 * np.stack(waves)[..., None] * generator.uniform(0.3, 1, (len(labels), 1, 1, 3))
        stripes: np.ndarray = (values + generator.normal(0, 10, values.shape)).clip(0, 255).astype(np.uint8)
        return stripes

    train, val = np.arange(256) % 4, np.arange(128) % 4
    path = tmp_path_factory.mktemp("stripes") / "stripes.npz"
    np.savez(path, images=images(train), labels=train, val_images=images(val), val_labels=val)
    return path


def words_of(output: Path, root: Path) -> list[str]:
    options = OPTIONS | {"--data.root": str(root), "--output": str(output)}
    return ["cifar10_fast", "--model.no-cifar-stem", *(word for pair in options.items() for word in pair)]


def run(output: Path, root: Path, *words: str) -> int:
    """`byol-fast bench cifar10 cifar10_fast` with a small network, in this process."""
    return bench_cifar10.main([*words_of(output, root), *words])


def plan_of(output: Path, root: Path, **changes: Any) -> SpeedPlan:
    """The plan of `run`."""
    return replace(bench_cifar10.plan(words_of(output, root)), **changes)


def encoder(output: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(output / f"cifar10_fast-seed{seed}" / "encoder.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def finished(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two seeds."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert run(output, stripes, "--seeds", "2") == 0
    return output


# ------------------------------------------------------------------------------------------------ logs


def test_log_has_a_line_for_each_evaluation(finished: Path) -> None:
    log = read_log(finished / "cifar10_fast-seed1.jsonl")
    header = log.header
    assert (header["recipe"], header["seed"], header["epochs"], header["steps"]) == ("cifar10_fast", 1, 2, 2 * EPOCH)
    assert header["finished"] and header["starts"] == 1 and header["setup_seconds"] > 0
    assert header["images"]["train"] == 256 and header["images"]["val"] == 128
    assert header["command"].startswith("byol-fast bench cifar10 cifar10_fast --model.no-cifar-stem --epochs 2")
    assert header["environment"]["packages"]["torch"] and header["environment"]["mode"] == "eager"
    assert [(line["epoch"], line["step"]) for line in log.evaluations] == [(0, 0), (1, EPOCH), (2, 2 * EPOCH)]
    seconds = [line["seconds"] for line in log.evaluations]
    assert seconds[0] == 0 and seconds == sorted(seconds)
    for line in log.evaluations:
        assert (line["knn_low"], line["knn_high"]) == wilson_interval(round(128 * line["knn_top1"]), 128)
        assert line["watts"] is None and line["evaluation_seconds"] > 0 and line["num_val"] == 128
    # The first step is setup; all other images of the epoch are trained on within its seconds.
    rate = log.evaluations[1]["images_per_second"]
    assert rate * seconds[1] == pytest.approx(32 * (EPOCH - 1))
    metrics = [json.loads(text) for text in (finished / log.name / "metrics.jsonl").read_text().splitlines()]
    assert [r["knn_top1"] for r in metrics if "knn_top1" in r] == [line["knn_top1"] for line in log.evaluations]
    assert log.evaluations[-1]["knn_top1"] > 0.5  # four classes


def test_digest_leaves_paths_out(finished: Path) -> None:
    header = read_log(finished / "cifar10_fast-seed0.jsonl").header
    config = configs.load(finished / "cifar10_fast-seed0" / "config.json")
    assert config.data.root is not None and header["config"]["data"]["root"] is None
    moved = configs.replace(config, {"data.root": Path("elsewhere"), "out": Path("other"), "name": "x"})
    assert header["config_digest"] == config_digest(config) == config_digest(moved)
    assert config_digest(configs.replace(config, {"optim.lr": 0.3})) != header["config_digest"]


def test_summary_and_chart_are_written(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    values = summary["recipes"]["cifar10_fast"]
    assert values["seeds"] == [0, 1] and values["finished"] == [True, True]
    assert set(values["minutes_to"]) == {str(threshold) for threshold in THRESHOLDS}
    assert [p["minutes"] for p in summary["published"]] == [121.9, 108.3, 400.9, 164.0]
    chart = (finished / "knn.svg").read_text()
    names = ["cifar10_fast-seed0", "cifar10_fast-seed1", *(f"{p.name} ({p.device})" for p in CIFAR10_KNN)]
    assert chart.startswith("<svg") and [name for name in names if name not in chart] == []


# ------------------------------------------------------------------------------------------------ cut and continued


class Act(Callback):
    """Calls a function after a step, once."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step == self.step:
            self.act()


def fail() -> None:
    raise RuntimeError("lost")


def disk_full_at(num_lines: int) -> Callable[[Path, str], None]:
    """`atomic_write` that cannot write files of this many lines or more."""

    def write(path: Path, text: str) -> None:
        if text.count("\n") >= num_lines:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        atomic_write(path, text)

    return write


def test_cut_run_continues_with_its_time(
    finished: Path, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal, a full disk at the first evaluation, and an error in the second epoch, whose steps are lost."""
    plan = plan_of(tmp_path, stripes)
    with pytest.raises(Interrupted, match="saved after step 3; go on with: byol-fast bench cifar10 cifar10_fast"):
        train_all(plan, [Act(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    first = read_log(tmp_path / "cifar10_fast-seed0.jsonl")
    assert not first.header["finished"] and [line["step"] for line in first.evaluations] == [0]
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"seed0.jsonl could not .*; free space"):
        patch.setattr(speed_log, "atomic_write", disk_full_at(3))
        train_all(plan)
    assert [line["step"] for line in read_log(first.path).evaluations] == [0]
    pause = 0.5
    with pytest.raises(RuntimeError, match="lost"):
        train_all(plan, [Act(EPOCH + 2, lambda: time.sleep(pause)), Act(EPOCH + 4, fail)])
    second = read_log(first.path)
    assert [line["step"] for line in second.evaluations] == [0, EPOCH]
    assert second.header["seconds"] > second.evaluations[-1]["seconds"] + pause  # the lost steps count
    assert run(tmp_path, stripes) == 0
    last = read_log(first.path)
    assert [line["step"] for line in last.evaluations] == [0, EPOCH, 2 * EPOCH]
    assert last.evaluations[:2] == second.evaluations and last.header["starts"] == 4
    assert last.evaluations[-1]["seconds"] > second.header["seconds"]
    assert_same_weights(encoder(tmp_path), encoder(finished))
    uncut = read_log(finished / first.path.name)
    assert [line["knn_top1"] for line in last.evaluations] == [line["knn_top1"] for line in uncut.evaluations]


def test_finished_runs_stay_as_they_are(finished: Path, stripes: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.suffix in {".jsonl", ".pt"}}

    before = times()
    assert run(finished, stripes) == 0 and times() == before


class Arrival(Callback):
    """Copies a finished run into the output while another one trains, as if another process had trained it."""

    def __init__(self, finished: Path, output: Path) -> None:
        self.finished, self.output = finished, output

    def on_run_begin(self, trainer: Trainer) -> None:
        name = "cifar10_fast-seed1"
        shutil.copytree(self.finished / name, self.output / name)
        shutil.copy(self.finished / f"{name}.jsonl", self.output)


def test_run_of_another_process_stays_as_it_is(finished: Path, stripes: Path, tmp_path: Path) -> None:
    copy_unfinished(finished, tmp_path)
    logs = train_all(plan_of(tmp_path, stripes, seeds=2), [Arrival(finished, tmp_path)])
    assert [log.header["starts"] for log in logs] == [2, 1]
    name = "cifar10_fast-seed1.jsonl"
    assert (tmp_path / name).read_text() == (finished / name).read_text()


def copy_unfinished(finished: Path, output: Path) -> tuple[Path, Path]:
    """The log and run folder of seed 0, as if the process had been killed just before the end."""
    log = read_log(finished / "cifar10_fast-seed0.jsonl")
    folder = output / log.name
    shutil.copytree(finished / log.name, folder)
    log.path, log.header["finished"] = output / log.path.name, False
    log.save()
    return log.path, folder


def test_lost_log_or_checkpoints_are_named(finished: Path, stripes: Path, tmp_path: Path) -> None:
    log, folder = copy_unfinished(finished, tmp_path)
    plan = plan_of(tmp_path, stripes)
    shutil.move(log, tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"its log, .*seed0.jsonl, is gone; put it back, delete both, or choose"):
        plan.runs()
    shutil.move(tmp_path / "moved", log)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="its folder of checkpoints is gone; put it back, delete both, or choose"):
        plan.runs()
    shutil.rmtree(folder)
    assert [run.checkpointed for run in plan.runs()] == [None]


# ------------------------------------------------------------------------------------------------ epochs that fit


def test_minutes_plan_the_epochs_and_leave_the_weights(
    finished: Path, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_run, "MEASURED_SECONDS", 0.1)
    (log,) = train_all(plan_of(tmp_path / "long", stripes, minutes=60.0))
    assert (log.header["epochs"], log.header["minutes"]) == (2, 60.0)  # not more than the configuration's
    assert_same_weights(encoder(tmp_path / "long"), encoder(finished))
    with pytest.raises(ConfigError, match=r"--minutes must be at least .* for one epoch of cifar10_fast .*, got 0.001"):
        train_all(plan_of(tmp_path / "short", stripes, minutes=0.001))
    assert not (tmp_path / "short").exists()


def test_another_seed_has_the_epochs_of_the_first(stripes: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, stripes, minutes=5.0, seeds=2)
    (config,) = plan.configs
    started = plan.with_epochs(configs.replace(config, {"seed": 0}), 1)
    log = SpeedLog.new(tmp_path / "cifar10_fast-seed0.jsonl", started, command="", minutes=5.0)
    log.header |= {"images": {"train": 256, "val": 128, "fingerprint": "x"}, "environment": {}}
    log.save()
    assert [(run.config.epochs, run.config.seed) for run in plan.runs()] == [(1, 0), (1, 1)]
    with pytest.raises(
        ConfigError, match=r"minutes was 5.0 and is 6.0; drop these options, or choose another --output"
    ):
        replace(plan, minutes=6.0).runs()


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def folder(photos: np.ndarray, tmp_path: Path) -> Path:
    """Twelve PNG files of three classes, in folders train and test."""
    for number, image in enumerate(photos[:12]):
        path = tmp_path / "images" / ("test" if number % 4 == 0 else "train") / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_files_are_decoded_once(folder: Path, photos: np.ndarray, tmp_path: Path) -> None:
    config = configs.replace(speed_run_config(recipes.cifar10_fast()), {"data.root": folder, "out": tmp_path / "out"})
    images = Images.prepare(config)
    assert images.file is not None and (images.record["train"], images.record["val"]) == (9, 3)
    arrays = np.load(images.file)
    order = sorted((n for n in range(12) if n % 4), key=lambda n: (n % 3, n))
    assert np.array_equal(arrays["images"], photos[order]) and arrays["labels"].tolist() == [n % 3 for n in order]
    assert arrays["val_labels"].tolist() == [0, 1, 2]
    time_before = images.file.stat().st_mtime_ns
    again = Images.prepare(config)
    assert again.record == images.record and images.file.stat().st_mtime_ns == time_before
    decoded = Images.prepare(images.configure(config))
    assert decoded.file is None and (decoded.record["train"], decoded.record["val"]) == (9, 3)


def test_images_of_several_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 24)).save(folder / "train" / "a" / "other.png")
    config = configs.replace(speed_run_config(recipes.cifar10_fast()), {"data.root": folder, "out": tmp_path / "out"})
    with pytest.raises(SourceError, match=r"all training images must have one size, got 32 x 32 .* 24 x 20 in .*other"):
        Images.prepare(config)
    (folder / "train" / "a" / "other.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"must be intact, but .*other.png is not an image; replace it or remove it"):
        Images.prepare(config)
    assert not list((tmp_path / "out").glob("*"))


# ------------------------------------------------------------------------------------------------ errors


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    """Further errors before torch is imported: tests/cli/test_early_errors.py."""
    file, output = tmp_path / "file", tmp_path / "output"
    file.touch()
    with pytest.raises(ConfigError, match="choose another --output"):
        bench_cifar10.main(["cifar10_fast", "--output", str(file)])
    with pytest.raises(SourceError, match=r"CIFAR-10 is not in .*file and could not be downloaded .*give --data.root"):
        bench_cifar10.main(["cifar10_fast", "--data.cache", str(file), "--output", str(output)])
    assert not output.exists()


def test_several_processes_are_refused(stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        train_all(plan_of(tmp_path, stripes))


def test_another_configuration_is_refused(finished: Path, stripes: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed0.jsonl must be continued as it was started, but optim.lr was 0.2 and"):
        run(finished, stripes, "--optim.lr", "0.3")


def test_other_images_are_refused(finished: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be continued with its images, but they were 256 \+ 128 .* are 9 \+ 3"):
        run(finished, folder, "--seeds", "3")


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"format": 1}\n', '[{"step": 1}]\n'])
def test_damaged_log_is_refused(content: str, tmp_path: Path, stripes: Path) -> None:
    (tmp_path / "cifar10_fast-seed0.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"seed0.jsonl must be a log of format 1 .*delete it"):
        plan_of(tmp_path, stripes).runs()


# ------------------------------------------------------------------------------------------------ real images


@pytest.mark.slow
def test_cifar10_images_are_learned(tmp_path: Path) -> None:
    """2,000 images for training and 500 for validation: kNN beats chance after three epochs."""
    counts: Counter[str] = Counter()
    with tarfile.open(real_data("cifar10_jpeg.tar.xz"), "r|xz") as archive:
        for member in archive:
            part = member.name.split("/")[-3] if member.name.count("/") > 1 else ""
            name = f"{part}/{Path(member.name).parent.name}"
            if member.isfile() and counts[name] < {"train": 200, "test": 50}.get(part, 0):
                counts[name] += 1
                archive.extract(member, tmp_path / "images", filter="data")
    root = next((tmp_path / "images").rglob("train")).parent
    words = ["--epochs", "3", "--batch-size", "50", "--optim.lr", "0.06", "--optim.warmup-epochs", "0"]
    assert run(tmp_path / "output", root, *words) == 0
    log = read_log(tmp_path / "output" / "cifar10_fast-seed0.jsonl")
    assert (log.header["images"]["train"], log.header["images"]["val"]) == (2000, 500)
    assert log.evaluations[-1]["knn_low"] > 0.1
