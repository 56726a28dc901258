"""The thread of a tracker: order, what is dropped and counted, errors, and the built-in trackers' packages."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from byol_fast.config import ConfigError
from byol_fast.trackers import Metrics, RunInfo, Tracker, check_installed, thread
from byol_fast.trackers.base import named_metrics
from byol_fast.trackers.tensorboard import TensorBoardTracker
from byol_fast.trackers.thread import TrackerThread
from tests.trackers.recorder import Recorder


def info(folder: Path) -> RunInfo:
    return RunInfo(name="x", folder=folder, config={}, environment={}, first_step=0, tracker_run=None)


def start(tracker: Tracker, folder: Path, begun: list[str] | None = None) -> TrackerThread:
    return TrackerThread(tracker, info(folder), (list[str]() if begun is None else begun).append)


def steps(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": float(step)} for step in range(first, last + 1)]


def finish(running: TrackerThread, seconds: float = 60.0) -> None:
    running.end("finished")
    running.join(time.monotonic() + seconds)


def test_names_of_metrics_have_a_group() -> None:
    step = {"step": 3, "epoch": 0.5, "loss": None, "lr": 1, "tau": 0.9, "data_wait": 0.1, "peak_memory_gib": 1.5}
    values = {"train/epoch": 0.5, "train/lr": 1.0, "train/tau": 0.9, "perf/data_wait": 0.1, "perf/peak_memory_gib": 1.5}
    assert named_metrics(step, evaluation=False) == Metrics(3, values)
    skipped = {"step": 4, "embedding_std": 0.8, "images_per_second": 9.0, "probe_top1": 0.2, "skipped": True}
    values = {"train/embedding_std": 0.8, "perf/images_per_second": 9.0, "train/probe_top1": 0.2, "train/skipped": 1.0}
    assert named_metrics(skipped, evaluation=False) == Metrics(4, values)
    record = {
        "step": 0,
        "epoch": 0.0,
        "knn_top1": 0.5,
        "knn_k": 20,
        "knn_num_train": 9,
        "rankme": None,
        "images": "all",
    }
    assert named_metrics(record, evaluation=True) == Metrics(0, {"eval/knn_top1": 0.5})


def test_slow_tracker_loses_what_does_not_fit_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thread, "MAX_WAITING", 5)
    tracker, begun = Recorder(waiting=["log"]), list[str]()
    running = start(tracker, tmp_path, begun)
    running.log(steps(1, 2))
    assert tracker.reached.wait(60)
    for first in (3, 5, 7, 9):
        running.log(steps(first, first + 1))
    tracker.release.set()
    finish(running)
    assert [m.step for m in tracker.metrics] == [1, 2, 3, 4, 5, 6, 7]
    assert (begun, tracker.ends) == (["recorder 1"], ["finished"])
    message = "recorder: 3 of 10 records were not logged there, because it was too slow; metrics.jsonl has them"
    assert caplog.messages == [message]


@pytest.mark.parametrize("method", ["begin", "log", "end"])
def test_hanging_tracker_is_left_after_a_bounded_time(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Recorder(waiting=[method])
    running = start(tracker, tmp_path)
    running.log(steps(1, 3))
    if method == "end":
        running.end("finished")
    assert tracker.reached.wait(60)
    finish(running, seconds=0.01)
    running.log(steps(4, 5))
    tracker.release.set()
    running.join(time.monotonic() + 60)
    assert [m.step for m in tracker.metrics] == ([] if method == "begin" else [1, 2, 3])
    problem = "3 of 3 records were not logged there, because it was too slow; metrics.jsonl has them"
    late = "it did not finish in time; files or the state of its run may be missing there"
    assert caplog.messages == [f"recorder: {late if method == 'end' else problem}"]


@pytest.mark.parametrize("error", [None, SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["begin", "log", "artifact", "end"])
def test_error_of_a_tracker_is_one_warning(
    method: str, error: BaseException | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, path = Recorder(failing=[method], error=error), tmp_path / "report.html"
    path.write_text("page")
    running = start(tracker, tmp_path)
    for step in (1, 2, 3):
        running.log(steps(step, step))
        running.artifact(path)
    finish(running)
    lost = "recorder: 3 of 3 records were not logged there, because it failed; metrics.jsonl has them"
    texts = {SystemExit: "SystemExit: 3", KeyboardInterrupt: "KeyboardInterrupt", type(None): f"{method}: no server"}
    text = texts[type(error)]
    first, begin = f"recorder: {text}; training goes on", f"recorder: this run is not logged there: {text}"
    assert caplog.messages == {"begin": [begin], "log": [first, lost]}.get(method, [first])
    assert [m.step for m in tracker.metrics] == ([] if method in {"begin", "log"} else [1, 2, 3])
    assert tracker.ends == ([] if method in {"begin", "end"} else ["finished"])


@pytest.mark.parametrize(
    ("identifier", "kept", "problem"),
    [
        (17, ["17"], ""),
        ("", [""], ""),
        (None, [], ""),
        (object(), [], "must return text, an integer or None, got object"),
    ],
)
def test_identifier_of_a_run_is_kept_as_text(
    identifier: Any, kept: list[str], problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, begun = Recorder(), list[str]()
    tracker.begin = lambda run: identifier  # type: ignore[method-assign]
    running = start(tracker, tmp_path, begun)
    running.log(steps(1, 1))
    finish(running)
    assert begun == kept
    assert [m.step for m in tracker.metrics] == [1]
    assert problem in caplog.text and len(caplog.messages) == bool(problem)


def test_identifier_that_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def keep(identifier: str) -> None:
        raise OSError(f"no space for {identifier}")

    tracker = Recorder()
    running = TrackerThread(tracker, info(tmp_path), keep)
    running.log(steps(1, 1))
    finish(running)
    assert [m.step for m in tracker.metrics] == [1]
    (message,) = caplog.messages
    assert "a resumed run would be a new one there" in message and "no space for recorder 1" in message


@pytest.mark.parametrize("in_the_way", [True, False], ids=["file", "deleted"])
def test_tensorboard_without_its_folder_raises(in_the_way: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    tracker, before = TensorBoardTracker(), set(threading.enumerate())
    if in_the_way:
        (tmp_path / "tb").touch()
        with pytest.raises(OSError, match="tb"):
            tracker.begin(info(tmp_path))
        return
    tracker.begin(info(tmp_path))
    tracker.log([Metrics(1, {"train/loss": 1.0})])
    shutil.rmtree(tmp_path / "tb")
    with pytest.raises(FileNotFoundError, match="tb"):
        tracker.log([Metrics(2, {"train/loss": 1.0})])
    tracker.end("finished")
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_is_an_error_with_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # as wandb leaves it; Python would import it as a package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.util.find_spec(name) is not None
    with pytest.raises(
        ConfigError, match=rf"log must name installed trackers, {name} is not; pip install '.\[{name}\]'"
    ):
        check_installed([name])
