from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from byol_fast.training.metrics import ThroughputMeter


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
