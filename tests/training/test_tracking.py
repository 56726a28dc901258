"""Trackers of a run: what they get, resumed runs, and runs whose tracker fails or hangs."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byol_fast import Callback, TrackerCallback, pretrain
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.trackers import thread
from byol_fast.training import tracking
from byol_fast.training.errors import Interrupted
from byol_fast.training.metrics_file import read
from byol_fast.training.trainer import Trainer
from tests.trackers.recorder import Recorder
from tests.training.helpers import AtStep

STEP_NAMES = {"train/epoch", "train/loss", "train/lr", "train/tau", "train/embedding_std", "train/probe_top1"}
STEP_NAMES |= {"perf/images_per_second", "perf/data_wait", "perf/peak_memory_gib"}
EVAL_NAMES = {"eval/knn_top1", "eval/knn_top5", "eval/rankme"}


@pytest.fixture
def evaluated(small: Config) -> Config:
    """A run of six steps, with evaluations of some images before, after five and after all, then one of all images."""
    some = {"max_train": 30, "max_val": 6, "full_at_end": True, "k": 1}
    return configs.replace(small, {"knn": {"val_root": small.data.root, "every_epochs": 1, **some}})


def named(record: dict[str, Any]) -> dict[str, float]:
    """The values of a record of metrics.jsonl by the trackers' names."""
    later = {"eval/probe_val_top1", "eval/knn_full_top1", "eval/knn_full_top5"}
    names = {name.partition("/")[2]: name for name in STEP_NAMES | EVAL_NAMES | later}
    left_out = {"step", "knn_k", "knn_num_train", "knn_num_val"} | (set() if "loss" in record else {"epoch"})
    return {names[name]: value for name, value in record.items() if name not in left_out}


def test_tracker_follows_a_run_and_its_resumption(evaluated: Config) -> None:
    tracker = Recorder()
    interrupt = AtStep(4, lambda: signal.raise_signal(signal.SIGTERM))
    trainer = Trainer(evaluated, callbacks=[interrupt, TrackerCallback([tracker])])
    with pytest.raises(Interrupted):
        trainer.fit()
    run_dir = trainer.run_dir
    assert tracker.ends == ["interrupted"]
    assert tracker.files == {name: (run_dir / name).read_text() for name in ("config.json", "environment.json")}
    page = AtStep(6, lambda: (run_dir / "report.html").write_text("page"))
    Trainer(evaluated, resume=run_dir, callbacks=[page, TrackerCallback([tracker])]).fit()

    assert [(m.step, m.values) for m in tracker.metrics] == [
        (r["step"], named(r)) for r in read(run_dir / "metrics.jsonl")
    ]
    assert [m.step for m in tracker.metrics] == [0, 1, 2, 3, 4, 5, 5, 6, 6, 6]
    assert set(tracker.metrics[-1].values) == {"eval/knn_full_top1", "eval/knn_full_top5"}
    assert set(tracker.metrics[1].values) == STEP_NAMES
    assert set(tracker.metrics[0].values) == EVAL_NAMES
    assert tracker.ends == ["interrupted", "finished"]
    assert tracker.files["report.html"] == "page"
    assert tracker.threads == {"tracker recorder"}
    first, second = tracker.runs
    assert (first.name, first.folder, first.first_step, first.tracker_run) == ("tiny", run_dir, 0, None)
    assert (second.first_step, second.tracker_run) == (4, "recorder 1")
    assert first.config == json.loads((run_dir / "config.json").read_text())
    assert first.environment == trainer.environment


@pytest.mark.parametrize(
    ("options", "lost"), [({"failing": ["log"]}, "it failed"), ({"waiting": ["begin"]}, "it was too slow")]
)
def test_run_does_not_depend_on_a_tracker(
    options: dict[str, Any],
    lost: str,
    small: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Recorder(**options)
    if tracker.waiting:
        monkeypatch.setattr(thread, "_SILENT_SECONDS", 0.01)
        monkeypatch.setattr(tracking, "END_SECONDS", 0.05)
    result = Trainer(small, callbacks=[TrackerCallback([tracker])]).fit()
    tracker.release.set()
    assert [r["step"] for r in read(result.run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert ("waiting for recorder, at most" in capsys.readouterr().out) == bool(tracker.waiting)
    messages = [message for message in caplog.messages if message.startswith("recorder: ")]
    assert messages[-1] == f"recorder: 6 of 6 records were not logged there, because {lost}; metrics.jsonl has them"
    assert len(messages) == (2 if tracker.failing else 1)


def test_run_that_begins_anew_forgets_the_trackers_run(small: Config) -> None:
    tracker = Recorder()
    for step in (2, 6):  # an error before the first checkpoint, then a whole run
        callbacks = [AtStep(step, lambda step=step: 1 // (step - 2)), TrackerCallback([tracker])]  # type: ignore[misc]
        trainer = Trainer(small, callbacks=callbacks)
        if step == 2:
            with pytest.raises(ZeroDivisionError):
                trainer.fit()
        else:
            trainer.fit()
    assert tracker.ends == ["failed", "finished"]
    assert [run.tracker_run for run in tracker.runs] == [None, None]
    assert (trainer.run_dir / "trackers" / "recorder").read_text() == "recorder 2\n"


def test_trackers_of_other_processes_are_idle() -> None:
    tracker = Recorder()
    callback, trainer = TrackerCallback([tracker]), SimpleNamespace(world=SimpleNamespace(is_main_process=False))
    other: Any = trainer
    callback.on_run_begin(other)
    callback.on_log(other, [{"step": 1, "loss": 1.0}])
    assert not tracker.threads


def test_names_of_trackers_are_unique_file_names() -> None:
    for names in (["a", "a"], ["a/b"], [""], [".."]):
        with pytest.raises(ValueError, match="trackers: names must differ and be plain file names, got"):
            TrackerCallback([Recorder(name) for name in names])


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["wandb"], "got 'wandb'; built-in trackers are named by log=('wandb',)"),
        ("wandb", "got 'wandb'; built-in trackers are named by log=('wandb',)"),
        (Recorder(), "be a list of trackers, got Recorder; pass TrackerCallback([...])"),
        ([Recorder], "got the class Recorder; pass Recorder()"),
        ([SimpleNamespace(name="x", begin=print, log=print)], "got SimpleNamespace without artifact, end;"),
        (None, "got NoneType"),
    ],
)
def test_wrong_kind_of_tracker_is_refused(trackers: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^trackers: must .*{re.escape(message)}"):
        TrackerCallback(trackers)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Recorder()], "got Recorder without the hook on_run_begin; pass it in byol_fast.TrackerCallback([...])"),
        ([Callback], "got the class Callback; pass Callback()"),
        (Callback(), "be a list of byol_fast.Callback objects, got Callback; pass callbacks=[...]"),
        ([print], "got builtin_function_or_method without the hook on_run_begin; derive it from byol_fast.Callback"),
    ],
)
def test_wrong_kind_of_callback_is_refused_before_the_start(callbacks: Any, message: str, small: Config) -> None:
    for start in (Trainer, lambda config, callbacks: pretrain(None, config, callbacks=callbacks)):
        with pytest.raises(TypeError, match=rf"^callbacks: must .*{re.escape(message)}"):
            start(small, callbacks=callbacks)
    assert not (small.out / "tiny").exists()


def test_missing_package_is_an_error_before_the_start(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mlflow is not; pip install"):
        Trainer(configs.replace(small, {"log": ["mlflow"]}))
    assert not (small.out / "tiny").exists()


def test_tensorboard_has_the_metrics_of_a_resumed_run(evaluated: Config) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = configs.replace(evaluated, {"log": ["tensorboard"], "checkpoint_every": 3})
    (evaluated.out / "tiny").parent.mkdir(exist_ok=True)
    trainer = Trainer(config, callbacks=[AtStep(5, lambda: 1 // 0)])  # saved after 3 steps, logged to the fourth
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    run_dir: Path = Trainer(config, resume=trainer.run_dir).fit().run_dir
    events = accumulators.EventAccumulator(str(run_dir / "tb")).Reload()
    expected: dict[str, list[Any]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        for name, value in named(record).items():
            expected.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    assert {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]} == expected
