"""Backend flags of a comparison: equal for all candidates of a precision, and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.bench import end_to_end
from byol_fast.bench.candidates import Candidate, ablation_candidates, baseline, build_step, library_candidates
from byol_fast.bench.problem import Problem
from byol_fast.bench.processes import measure
from byol_fast.bench.results import Results
from byol_fast.bench.timing import Timing

CPU = torch.device("cpu")
PROBLEM = Problem(encoder="resnet18_narrow", image_size=32, batch_size=4, hidden_dim=16, projection_dim=8)

Flags = tuple[bool, bool, bool]
"""TF32 in cuDNN's convolutions, TF32 in matrix products, cudnn.benchmark."""

# The defaults of torch, and so the flags of a loop that sets none.
DEFAULTS: Flags = (True, False, False)
EXPECTED: dict[str, Flags] = {"fp32": DEFAULTS, "bf16": DEFAULTS, "tf32": (True, True, False)}


def flags() -> Flags:
    backends = torch.backends
    return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark


def set_flags(values: Flags) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = values


@pytest.fixture(autouse=True)
def _flags_restored() -> Iterator[None]:
    before = flags()
    yield
    set_flags(before)


class FlagsAtOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the flags at each operator, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, set[Flags]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(func.overloadpacket.__name__, set()).add(flags())
        return func(*args, **(kwargs or {}))


def flags_during(call: Callable[[], object]) -> set[Flags]:
    with FlagsAtOperators() as mode:
        call()
    operators = ("convolution", "convolution_backward", "addmm", "mm")
    assert mode.seen.keys() >= set(operators)
    return set.union(*(mode.seen[name] for name in operators))


def candidates() -> dict[str, Candidate]:
    steps = library_candidates(CPU, "bf16")
    for precision in EXPECTED:
        steps |= ablation_candidates(CPU, precision, ("eager",))
    return steps


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.peers if c.requires else ()) for n, c in candidates().items()]
)
def test_candidates_of_a_precision_have_equal_flags(name: str) -> None:
    candidate = candidates()[name]
    if not candidate.is_installed:
        pytest.skip(f"{candidate.requires} is not installed")
    expected = EXPECTED[candidate.options.get("precision", "fp32")]
    for wanted, problem in (
        (expected, PROBLEM),
        ((*expected[:2], True), dataclasses.replace(PROBLEM, cudnn_benchmark=True)),
    ):
        job = candidate.job(problem)
        set_flags((not wanted[0], not wanted[1], not wanted[2]))  # earlier settings of this process must not matter
        assert flags_during(build_step(**job.arguments)) == {wanted}


@pytest.fixture
def images(tmp_path: Path, photos: np.ndarray) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(photos[:8]):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("lightly", [False, pytest.param(True, marks=pytest.mark.peers)], ids=["plain", "lightly"])
def test_end_to_end_loops_have_equal_flags(lightly: bool, images: Path) -> None:
    if lightly and find_spec("lightly") is None:
        pytest.skip("lightly is not installed")
    jobs = end_to_end.build_jobs(PROBLEM, images, steps=1, precision="tf32", mode="eager", lightly=lightly)
    assert len(jobs) == 4 + lightly
    for name, job in jobs.items():
        wanted = EXPECTED["tf32" if name.endswith("tf32") else "fp32"]
        set_flags((not wanted[0], not wanted[1], not wanted[2]))
        factory = getattr(end_to_end, job.factory.partition(":")[2])
        assert flags_during(factory(**job.arguments)) == {wanted}, name


def test_flags_of_a_process_are_recorded() -> None:
    problem = dataclasses.replace(PROBLEM, cudnn_benchmark=True)
    jobs = {"tf32": baseline(precision="tf32").job(problem), "fp32": baseline().job(PROBLEM)}
    measurements = measure(jobs, rounds=1, warmup=0, threads=1, device=CPU)
    assert {name: m.extras["flags"] for name, m in measurements.items()} == {
        "tf32": "TF32 in convolutions on, in matrix products on; cudnn.benchmark on",
        "fp32": "TF32 in convolutions on, in matrix products off; cudnn.benchmark off",
    }


def test_flags_shared_by_all_candidates_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"a": Timing((1.0,)), "b": Timing((1.0,)), "c": Timing((1.0,))}
    results = Results("step", "cpu")
    results.add("same", times, extras={name: {"flags": "F"} for name in times})
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line.endswith("F")] == ["all: F"]
    results.add("different", times, extras={"a": {"flags": "F"}, "b": {"flags": "G"}, "c": {"flags": "F"}})
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[-2:]] == ["a, c: F", "b: G"]
    assert results.rows()[1]["flags"] == "F"
