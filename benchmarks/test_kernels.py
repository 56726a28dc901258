"""The kernels under pytest-benchmark: `pytest benchmarks`. The cases are those of `byol_fast.bench.kernels`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from byol_fast.bench import kernels
from byol_fast.bench.counting import Case, synchronized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        (suite, provider, case)
        for suite, build in kernels.suites().items()
        for provider, case in build(DEVICE).cases.items()
    ]
    metafunc.parametrize(("suite", "provider", "case"), cases, ids=[f"{suite}-{name}" for suite, name, _ in cases])


def test_kernel(benchmark: BenchmarkFixture, suite: str, provider: str, case: Case) -> None:
    benchmark.group = suite
    benchmark.name = provider
    benchmark(synchronized(case, torch.device(DEVICE)))
