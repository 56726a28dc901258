"""The kernels for CPUs, in C: compiled at the first call by the machine's C compiler, as Triton does for its launchers.

Where there is no compiler, or another kind of CPU, the operators of `reference.py` do the same in more passes.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byol_kernels._multi_tensor import CHUNK

_SOURCE = Path(__file__).with_name("cpu.c")
# No -ffast-math: some compilers would then flush small numbers to zero in the whole process.
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", f"-DCHUNK={CHUNK}")
_FLAGS_OF = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
_SECONDS = 120


class Compiled(NamedTuple):
    """The compiled kernels, or why there are none."""

    library: ctypes.CDLL | None
    note: str
    """Compiler and instruction set, or the reason."""


_first_call = threading.Lock()
_compiled: Compiled | None = None


def compiled() -> Compiled:
    """Compiles the kernels, or finds what an earlier process compiled; once a process.

    The library is kept in `$XDG_CACHE_HOME/byol_kernels` (`~/.cache/byol_kernels`), or nowhere if that cannot be
    written. `CC` names another compiler than gcc, cc or clang.
    """
    global _compiled  # noqa: PLW0603 - one a process
    if _compiled is None:
        with _first_call:  # threads that load images may come first, all at once
            _compiled = _compiled or compile_or_find()
    return _compiled


def compile_or_find() -> Compiled:
    """What `compiled` does at its first call."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in {"aarch64", "arm64"} and capability not in _FLAGS_OF:
        return Compiled(None, f"the kernels are for CPUs with AVX2 or AVX-512, or 64-bit ARM, got {capability}")
    compiler = c_compiler()
    if compiler is None:
        return Compiled(None, "no C compiler")
    name = Path(compiler[0]).name
    try:
        source = _SOURCE.read_bytes()
        command = [*compiler, *_FLAGS, *_FLAGS_OF.get(capability, "").split()]
        key = repr((source, command, platform.machine(), platform.libc_ver()))
        file = f"cpu_{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        try:
            library = _load(_cache_folder() / file, command)
        except (OSError, RuntimeError):  # no home, full, read-only, or one from which nothing may be executed
            with tempfile.TemporaryDirectory() as folder:
                library = _load(Path(folder) / file, command)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        return Compiled(None, f"{name} did not compile them: {lines[0]}")
    except (OSError, subprocess.TimeoutExpired) as error:  # without names of temporary files: this is compared
        return Compiled(None, f"{name}: {type(error).__name__} {getattr(error, 'strerror', None) or ''}".rstrip())
    return Compiled(library, f"{name}, {capability}")


def c_compiler() -> list[str] | None:
    """The command of the C compiler: `CC`, gcc, cc or clang; None if there is none."""
    for command in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        words = command.split()
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byol_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _load(path: Path, command: Sequence[str]) -> ctypes.CDLL:
    if path.exists():
        try:
            return _open(path)
        except OSError:  # damaged
            path.unlink()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*command, str(_SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # opening half a library ends the process
        made.replace(path)  # other processes see all of it or nothing
    return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    library.lars_step.argtypes = [
        pointer, pointer, pointer, pointer, pointer, integer, integer, integer, number, number, small, pointer, pointer,
    ]  # fmt: skip
    library.lars_step.restype = None
    library.normalized_mse.argtypes = [
        pointer, pointer, integer, integer, pointer, pointer, pointer, integer, integer, pointer, integer, integer,
        number, number, number, small, small,
    ]  # fmt: skip
    library.normalized_mse.restype = number
    library.gaussian_blur.argtypes = [pointer, pointer, integer, integer, integer, integer, pointer, small]
    library.gaussian_blur.restype = small
    return library


_LOW = {torch.float32, torch.bfloat16}
_SMALL = 1 << 15
"""Elements of a prediction or an image up to which a second thread costs more than it brings."""
_left_out = False


@contextmanager
def left_out() -> Iterator[None]:
    """Do without the kernels, as where there is no compiler: for tests and benchmarks."""
    global _left_out  # noqa: PLW0603 - a switch of the process
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def library() -> ctypes.CDLL | None:
    """The compiled kernels, unless they are left out."""
    return None if _left_out else compiled().library


def _threads_for(numel: int) -> int:
    return 1 if numel <= _SMALL else torch.get_num_threads()


def takes_lars_of(kinds: Sequence[Sequence[torch.dtype]]) -> bool:
    """Whether `lars_step` is for rows of these dtypes.

    Args:
        kinds: of parameter, gradient, momentum, target, copy of the parameter, copy of the target.
    """
    return all({kind[0], *kind[2:4]} == {torch.float32} and _LOW.issuperset({kind[1], *kind[4:]}) for kind in kinds)


def normalized_mse(
    library: ctypes.CDLL,
    pairs: Sequence[tuple[Tensor, Tensor]],
    grads: Sequence[Tensor],
    shortest: float,
    longest: float,
    factor: float,
) -> float:
    """The sum of the cosines of all rows; NaN where a row is too short, too long or NaN for it, see `cpu.c`.

    Args:
        library: of `compiled`.
        pairs: one or two of prediction and target projection [B, D], float32 or bfloat16, with elements side by side.
        grads: out, `factor` times the derivative of that sum by each prediction [B, D]; or none.
        shortest: norm that it takes.
        longest: norm that it takes.
        factor: of the gradients.
    """
    batch, dim = pairs[0][0].shape
    described: list[int] = []
    for index, (p, z) in enumerate(pairs):
        described += [p.data_ptr(), z.data_ptr(), p.stride(0), z.stride(0), grads[index].data_ptr() if grads else 0]
    described += [0] * (10 - len(described))  # a second pair that is not there
    threads = _threads_for(batch * dim)
    low = pairs[0][0].dtype == torch.bfloat16
    total: float = library.normalized_mse(*described, batch, dim, shortest, longest, factor, low, threads)
    return total


def lars_step(
    library: ctypes.CDLL,
    addresses: Tensor,
    rows: Tensor,
    chunks: Tensor,
    low: Tensor,
    groups: Tensor,
    num_adapted: int,
    scale: float,
    weight: float,
    partials: Tensor,
    ratios: Tensor,
) -> None:
    """One step on as many threads as torch uses; see `cpu.c`.

    Args:
        library: of `compiled`.
        addresses: int64 [6, R].
        rows: int64 [R, 4].
        chunks: int64 [C, 2].
        low: int64 [kinds, 6], 1 for bfloat16.
        groups: float64 [groups, 4]: momentum, weight decay, eta, lr.
        num_adapted: chunks of adapted rows.
        scale: what gradients are multiplied by.
        weight: of the parameter in its target's average.
        partials: float64 [num_adapted, 2], to work with.
        ratios: float64 [R], out.
    """
    library.lars_step(
        addresses.data_ptr(), rows.data_ptr(), chunks.data_ptr(), low.data_ptr(), groups.data_ptr(),
        len(rows), len(chunks), num_adapted, scale, weight, torch.get_num_threads(),
        partials.data_ptr(), ratios.data_ptr(),
    )  # fmt: skip


def gaussian_blur(library: ctypes.CDLL, rows: Tensor, out: Tensor, channels: int, weights: Sequence[float]) -> bool:
    """Blurs an image; False if there was no memory for that, and then nothing is written.

    Args:
        library: of `compiled`.
        rows: float32 [H, W * channels], dense, the channels of a pixel side by side.
        out: the same.
        channels: of a pixel.
        weights: of the middle and of the pixels 1, 2, ... away.
    """
    height, width = rows.shape[0], rows.shape[1] // channels
    taps = (ctypes.c_float * len(weights))(*weights)
    done: int = library.gaussian_blur(
        rows.data_ptr(), out.data_ptr(), height, width, channels, len(weights) - 1, taps, _threads_for(rows.numel())
    )
    return bool(done)
