"""Throughput and the metrics file of a run."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byol_fast.training.metrics import MetricsLogger, ThroughputMeter
from byol_fast.training.metrics_file import read
from byol_fast.utils.errors import CheckpointError


def test_metrics_rewind_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path / "metrics.jsonl")
    for record in (
        {"step": 0, "knn_top1": 0.1},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "knn_top1": 0.2},
        {"step": 3, "loss": 3.0},
    ):
        log.add(record)
    log.flush()
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # what a crash leaves
    log.open(2, evaluated=True)
    assert [r["step"] for r in read(log.path)] == [0, 1, 2, 2]
    log.open(2, evaluated=False)
    assert read(log.path)[-1] == {"step": 2, "loss": 2.0}


def test_metrics_that_are_no_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="metrics: .* cannot be read"):
        read(tmp_path)


def test_damaged_line_of_the_metrics_loses_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLogger(tmp_path / "metrics.jsonl")
    lines = [b'{"step": %d, "loss": %d}' % (step, step) for step in range(1, 10)]
    damage = {1: b'{"step": 2, "lo', 2: lines[2].replace(b"step", b"st\xff\xfep"), 3: b"[" * 100_000}
    damage |= {4: b"5", 6: b"\0" * 20, 7: b""}
    damaged = [damage.get(number, line) for number, line in enumerate(lines)]
    log.path.write_bytes(b"\n".join(damaged) + b'\n{"step": 10, "lo')
    left = [1, 6, 9]
    assert [r["step"] for r in read(log.path)] == left
    log.open(9, evaluated=False)
    assert [(r["step"], r["loss"]) for r in read(log.path)] == [(step, step) for step in left]
    assert caplog.messages == [f"metrics: {log.path} has damaged lines (2, 3, 4, 5, 7); left out"]


def test_data_wait_leaves_out_pauses_and_what_the_loader_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, loader = SimpleNamespace(now=0.0), SimpleNamespace(gpu_wait_seconds=3.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter = ThroughputMeter()
    typed_loader: Any = loader
    for _ in range(2):
        with meter.data_wait(typed_loader):
            clock.now += 4.0  # a second for data, three for steps on the GPU
            loader.gpu_wait_seconds += 3.0
        clock.now += 1.0  # a step
        meter.count(50)
    with meter.paused():
        clock.now += 100.0
    throughput = meter.read()
    assert (throughput.images_per_second, throughput.data_wait) == (10.0, 0.2)
    assert meter.read().data_wait == 0.0


def test_folder_that_is_gone_is_not_a_full_disk(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path / "run" / "metrics.jsonl")
    log.add({"step": 1})
    with pytest.raises(CheckpointError, match=r"could not be written \(.*No such file.*\); put its folder back, then"):
        log.flush()
    log.path.parent.mkdir()
    log.flush()
    assert read(log.path) == [{"step": 1}]
