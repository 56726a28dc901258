"""Loss, LARS and blur as the machine's C compiler makes them: against float64, and what happens where it cannot."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_kernels import LARS, _cpu, byol_loss, gaussian_blur, reference
from tests.kernels.conftest import INTERPRETED
from tests.kernels.restatement import byol, close, ema, error, f64, lars, make


def reason_to_skip() -> str:
    """Why this machine cannot have the kernels, whatever is in them."""
    compiler = _cpu.c_compiler()
    if compiler is None:
        return "no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.c"
        source.write_text("#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n")
        command = [*compiler, "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(source.with_suffix(".so"))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return "the C compiler has no OpenMP"
    note = _cpu.compiled().note
    return note if note.startswith("the kernels are for CPUs with") else ""


NOT_HERE = "the interpreter's kernels stand where the CPU's are" if INTERPRETED else reason_to_skip()
pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)

HYPER: dict[str, Any] = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.05, "eta": 1e-2}
# Around a vector, a block of sums, a chunk, and the chunks that a thread takes at a time.
SIZES = [1, 31, 32, 33, 1023, 1025, 4095, 4096, 4097, 65536 + 3, 5]


@pytest.fixture(autouse=True)
def _no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test passes because the operators did the work."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the kernel was left out")

    monkeypatch.setattr(reference, "lars_step_", refuse)
    monkeypatch.setattr(reference, "normalized_mse_fwd", refuse)


def test_it_compiles_here() -> None:
    found = _cpu.compiled()
    assert found.library is not None, found.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 256, 1023, 1024, 1025, 8192])
def test_loss_matches_float64(dim: int, dtype: torch.dtype) -> None:
    """Around a vector and a block of sums; rows that lie apart, and rows that are one."""
    wide = make((5, dim + 3), 0, dtype)
    p1, p2 = wide[:, :dim].requires_grad_(), make((dim, 5), 1, dtype).t().requires_grad_()
    z1, z2 = make((1, dim), 2, dtype).expand(5, dim), make((5, dim), 3, dtype)
    loss = byol_loss(p1, p2, z1, z2)
    grads = torch.autograd.grad(loss, [p1, p2])
    expected, grad1, grad2 = byol(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for p, grad, exact in ((p1, grads[0], grad1), (p2, grads[1], grad2)):
        # With one column the gradient is 0, and what is left over is the difference of two numbers of size 1 / |p|.
        norm = float(np.linalg.norm(exact)) if dim > 1 else float(np.linalg.norm(1 / f64(p))) / 5
        assert float(np.linalg.norm(f64(grad) - exact)) <= (1e-6 if dtype == torch.float32 else 2.0**-8) * norm


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("low_gradient", [False, True])
@pytest.mark.parametrize("copies", ["none", "of both", "of parameters", "of targets", "in float32"])
def test_every_path_matches_float64(tau: float, low_gradient: bool, copies: str) -> None:
    """Adapted and not, with a gradient and without, with a target and without: each size has its turn at all."""
    params, targets = [], []
    for i, size in enumerate(SIZES):
        shape = (1, size) if i % 2 else (size,)
        params.append(nn.Parameter(make(shape, i)))
        targets.append(make(shape, 100 + i) if i % 3 else None)
    to_copy: dict[Tensor, Tensor] = {}
    dtype = torch.float32 if copies == "in float32" else torch.bfloat16
    if copies != "none":
        of_params = [] if copies == "of targets" else params
        of_targets = [] if copies == "of parameters" else [t for t in targets if t is not None]
        to_copy = {x: torch.full_like(x, torch.nan, dtype=dtype) for x in (*of_params, *of_targets)}
    optimizer = LARS(params, **HYPER)
    state = [np.zeros(tuple(p.shape)) for p in params]
    p64, t64 = [f64(p) for p in params], [None if t is None else f64(t) for t in targets]
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = None
            if i % 5 != 4:
                if low_gradient:
                    p.grad_dtype = torch.bfloat16
                p.grad = make(tuple(p.shape), 1000 * step + i, torch.bfloat16 if low_gradient else torch.float32)
                p64[i], state[i] = lars(p64[i], f64(p.grad), state[i], **HYPER, excluded=p.ndim <= 1)
            if (t := t64[i]) is not None:
                t64[i] = tau * t + (1 - tau) * p64[i]
        optimizer.step(ema=(targets, tau), copies=to_copy)
    for i, p in enumerate(params):
        assert error(p, p64[i]) <= 1e-6, i
        assert p.grad is None or error(optimizer.state[p]["momentum_buffer"], state[i]) <= 1e-6, i
        if (target := targets[i]) is not None:
            assert error(target, t64[i]) <= 1e-6, i  # type: ignore[arg-type]
            assert tau != 1.0 or torch.equal(target, make(tuple(p.shape), 100 + i))
            assert tau != 0.0 or torch.equal(target, p)
    for x, copy in to_copy.items():
        assert torch.equal(copy, x.detach().to(dtype))


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """Every pattern of the upper half of a float32, lower halves around the tie; without a gradient and with."""
    upper, lower = torch.arange(2**16, dtype=torch.int32), torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    p = nn.Parameter((upper[:, None] << 16 | lower.to(torch.int32)).view(torch.float32).flatten())
    for grad in (None, torch.zeros_like(p)):
        copy, p.grad = torch.zeros_like(p, dtype=torch.bfloat16), grad
        LARS([p], 0.1).step(copies=[copy])
        torch.testing.assert_close(copy, p.detach().bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    """More elements than the cache is given at a time, in one tensor and in several."""
    results = []
    for number in (1, threads):
        torch.set_num_threads(number)
        params = [nn.Parameter(make((size, 3), size)) for size in (7, 5000, 400_000, 12)]
        targets = [torch.zeros_like(p) for p in params]
        optimizer = LARS(params, **HYPER)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = make(tuple(p.shape), 10 * step + i)
            optimizer.step(ema=(targets, 0.9))
        results.append([*params, *targets])
        p1, p2, z1, z2 = (make((999, 77), seed) for seed in range(4))
        loss = byol_loss(p1.requires_grad_(), p2.requires_grad_(), z1, z2)
        results[-1] += [loss, *torch.autograd.grad(loss, [p1, p2])]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_blur_on_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough to be shared; the operators are the other implementation, and may round to the next level."""
    images = torch.randint(0, 256, (3, 3, 150, 161), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sigma, window = torch.tensor([0.4, 1.3, 2.0]), torch.tensor([3, 9, 23])
    with _cpu.left_out():
        expected = gaussian_blur(images, sigma, window)
    done, kernel = [], _cpu.gaussian_blur

    def watched(*arguments: Any) -> bool:
        done.append(kernel(*arguments))
        return done[-1]

    monkeypatch.setattr(_cpu, "gaussian_blur", watched)
    torch.set_num_threads(threads)
    out = gaussian_blur(images, sigma, window)
    assert done == [True] * 3
    difference = (out.int() - expected.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-4
    torch.set_num_threads(1)
    assert torch.equal(out, gaussian_blur(images, sigma, window))


def test_blur_whatever_torch_makes_by_default() -> None:
    images = torch.randint(0, 256, (2, 3, 40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sigma, window = torch.tensor([0.4, 2.0]), torch.tensor([3, 13])
    expected = gaussian_blur(images, sigma, window)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gaussian_blur(images, sigma, window), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_gradient_is_seen_in_the_weights(bad: float) -> None:
    """As with any optimizer: nothing hides it."""
    p = nn.Parameter(make((40, 50), 0))
    p.grad = make((40, 50), 1)
    p.grad[3, 4] = bad
    LARS([p], **HYPER).step()
    assert not bool(p[3, 4].isfinite())


def test_tables_follow_gradients_and_layouts() -> None:
    """A gradient of another layout is brought into the parameter's, at every step anew."""
    p = nn.Parameter(make((30, 7), 0))
    optimizer, expected, v = LARS([p], **HYPER), f64(p), np.zeros((30, 7))
    for step in range(3):
        grad = make((7, 30), step).mT
        p.grad = grad if step != 1 else grad.contiguous()
        expected, v = lars(expected, f64(grad), v, **HYPER, excluded=False)
        optimizer.step()
        assert close(p, expected)


def test_autograd_is_told() -> None:
    p, target = nn.Parameter(make((4, 4), 0)), make((4, 4), 1).requires_grad_()
    p.grad = make((4, 4), 2)
    losses = [p.square().sum(), (target * target).sum()]
    before = f64(target)
    LARS([p], 0.1).step(ema=([target.detach()], 0.5))
    assert close(target, ema(torch.from_numpy(before), p, 0.5))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


# ---- where it cannot be made ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a compiled kernel is kept: nothing there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "byol_kernels"


def compiled_anew() -> _cpu.Compiled:
    """As in a process of its own."""
    return _cpu.compile_or_find()


def test_it_is_compiled_once_for_all_processes(folder: Path) -> None:
    assert compiled_anew().library is not None
    (made,) = folder.iterdir()  # nothing else is left behind
    first = made.stat().st_mtime_ns
    assert compiled_anew().library is not None
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [first]


def test_a_damaged_library_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_anew().library is not None
    (good,) = folder.iterdir()
    elsewhere = folder.parent / "elsewhere"
    made = elsewhere / "byol_kernels" / good.name
    made.parent.mkdir(parents=True)
    made.write_bytes(b"no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    assert compiled_anew().library is not None
    assert made.stat().st_size > 1000 and list(made.parent.iterdir()) == [made]


def test_without_a_place_to_keep_it(folder: Path) -> None:
    folder.touch()
    assert compiled_anew().library is not None


def test_without_a_compiler_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "")
    assert compiled_anew() == (None, "no C compiler")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(3)", "did not compile them: exit status 3"),
        ("raise SystemExit('no OpenMP')", "did not compile them: no OpenMP"),
        ("", "FileNotFoundError No such file or directory"),
    ],
    ids=["fails", "says why", "makes nothing"],
)
def test_a_broken_compiler_is_reported(
    program: str, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compiler.py"
    script.write_text(program)
    monkeypatch.setenv("CC", f"{sys.executable} {script}")
    found = compiled_anew()
    assert found.library is None and said in found.note
    assert not list(folder.iterdir())  # nothing half made is left


def test_old_cpus_take_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert compiled_anew() == (None, "the kernels are for CPUs with AVX2 or AVX-512, or 64-bit ARM, got DEFAULT")
