"""Information about this machine: versions, GPU, DALI, CPU, memory and disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byol_fast.utils.env import cpu_has_bf16, cpu_name, num_cpus, version
from byol_fast.utils.memory import available_memory

DALI_DRIVERS = {"nvidia-dali-cuda130": 580, "nvidia-dali-cuda120": 525}
"""Oldest major version of NVIDIA's driver for a distribution of DALI."""
CUDA_DRIVERS = {"13": 580, "12": 525}
"""The same for the CUDA version of torch, by its major version."""
PROBE_SECONDS = 300
"""Timeout of the probes."""


@dataclass(kw_only=True, slots=True)
class SystemInfo:
    """Input of `run_checks`."""

    python: tuple[int, int] = (0, 0)
    system: str = ""
    torch: str | None = None
    torch_cuda: str | None = None
    """CUDA version that torch was built with; None for a build without CUDA."""
    torchvision: str | None = None
    triton: str | None = None
    gpus: list[str] = field(default_factory=list)
    """GPUs that torch can use."""
    driver: str | None = None
    """Version of NVIDIA's driver, even if torch cannot use it."""
    dali: str | None = None
    """Installed distribution of DALI: `name==version`."""
    probes: dict[str, str] = field(default_factory=dict)
    """Results of the tests in another process by name: `ok` or the problem."""
    compiler: str | None = None
    cpu: str = ""
    cpus: int = 1
    cpu_quota: float | None = None
    """CPU cores that the container may use; None for no limit."""
    torch_threads: int = 1
    bf16: bool = False
    memory_gib: float | None = None
    shm_gib: float | None = None
    disk_gib: float = 0.0
    """Free space in the current folder, where runs are written."""
    writable: bool = True
    """True if files can be written there."""
    open_files: int | None = None
    optional: dict[str, str | None] = field(default_factory=dict)
    """Versions of optional packages by name; None if not installed."""


def collect() -> SystemInfo:
    """Collect the information. Tests that may crash a process run in another one."""
    info = SystemInfo(
        python=(sys.version_info.major, sys.version_info.minor),
        system=f"{platform.system()} {platform.machine()}",
        triton=version("triton"),
        dali=next((f"{name}=={number}" for name in DALI_DRIVERS if (number := version(name)) is not None), None),
        driver=_driver(),
        compiler=_compiler(),
        cpu=cpu_name(),
        cpus=num_cpus(),
        cpu_quota=_cpu_quota(),
        bf16=cpu_has_bf16(),
        memory_gib=_free_memory(),
        shm_gib=_gib_free(Path("/dev/shm")),
        disk_gib=_gib_free(Path.cwd()) or 0.0,
        writable=os.access(Path.cwd(), os.W_OK),
        optional={name: version(name) for name in ("tensorboard", "pyarrow", "timm", "datasets")},
    )
    info.probes = run_probes()
    info.torch = info.probes.pop("torch version", None)
    info.torch_cuda = info.probes.pop("torch cuda", None)
    info.torchvision = info.probes.pop("torchvision version", None)
    info.torch_threads = int(info.probes.pop("torch threads", "1"))
    info.gpus = [info.probes.pop(name) for name in sorted(info.probes) if name.startswith("gpu ")]
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        info.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return info


def run_probes() -> dict[str, str]:
    """Run `probe` in another process, because a broken driver or DALI may crash or block it."""
    command = [sys.executable, "-c", "from byol_fast.doctor.system_info import probe; probe()"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        output, problem = process.stdout, f"the process ended with {process.returncode}: {_last_line(process.stderr)}"
    except subprocess.TimeoutExpired as error:
        stdout = error.stdout or b""
        output = stdout.decode(errors="replace") if isinstance(stdout, bytes) else stdout
        problem = f"no answer within {PROBE_SECONDS} s"
    results: dict[str, str] = {}
    running = None
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError, ValueError):
            name, result = json.loads(line)
            if result is None:
                running = name
            else:
                results[name] = result
                running = None if name == running else running
    if running is not None:
        results[running] = problem
    return results


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def probe() -> None:
    """Run the tests that may crash; print a JSON line `[name, result]` at the start (null) and end of each."""

    def report(name: str, result: str | None) -> None:
        print(json.dumps([name, result]), flush=True)

    def attempt(name: str, action: Callable[[], None]) -> bool:
        report(name, None)
        try:
            action()
        except Exception as error:  # any error is the result
            report(name, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
            return False
        report(name, "ok")
        return True

    if not attempt("torch", lambda: _probe_torch(report)):
        return
    attempt("torchvision", lambda: _probe_torchvision(report))
    has_gpu = attempt("cuda", lambda: _probe_cuda(report))
    attempt("kernels", lambda: _probe_kernels("cuda" if has_gpu else "cpu"))
    if any(version(name) for name in DALI_DRIVERS):
        attempt("dali", lambda: _probe_dali("cpu"))
        if has_gpu:
            attempt("dali on the GPU", lambda: _probe_dali("mixed"))


def _probe_torch(report: Callable[[str, str | None], None]) -> None:
    import torch

    report("torch version", torch.__version__)
    if torch.version.cuda is not None:
        report("torch cuda", torch.version.cuda)
    report("torch threads", str(torch.get_num_threads()))


def _probe_torchvision(report: Callable[[str, str | None], None]) -> None:
    import torchvision.transforms.v2.functional

    report("torchvision version", torchvision.__version__)


def _probe_cuda(report: Callable[[str, str | None], None]) -> None:
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        report(
            f"gpu {number:03d}",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}",
        )


def _probe_kernels(device: str) -> None:
    import torch

    from byol_kernels import byol_loss

    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(16, 64, generator=generator) for _ in range(4))
    cosine = torch.nn.functional.cosine_similarity
    expected = (4 - 2 * cosine(p1.double(), z2.double()) - 2 * cosine(p2.double(), z1.double())).mean()
    loss = byol_loss(*(x.to(device) for x in (p1, p2, z1, z2)))
    if abs(float(loss) - float(expected)) > 1e-4:
        raise ArithmeticError(f"the loss must be {float(expected):.6f}, got {float(loss):.6f}")


def _probe_dali(device: str) -> None:
    import numpy as np
    import nvidia.dali
    from PIL import Image

    dali: Any = nvidia.dali
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "JPEG", quality=95)
    encoded = np.frombuffer(buffer.getvalue(), np.uint8)

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=0 if device == "mixed" else None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        data = dali.fn.external_source(source=lambda: [encoded], batch=True)
        return dali.fn.decoders.image(data, device=device, output_type=dali.types.RGB)

    (images,) = pipeline().run()
    images = images.as_cpu() if device == "mixed" else images
    error = float(np.abs(images.as_array()[0].astype(float) - ramp).mean())
    if error > 4:
        raise ArithmeticError(f"a decoded JPEG differs by {error:.1f} levels")


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        match = re.search(r"Module\D*(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if match is not None:
            return match[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        stdout = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        if match := re.match(r"\d+\.[\d.]+", stdout):
            return match[0]
    return None


def _compiler() -> str | None:
    names = [*os.environ.get("CC", "").split()[:1], "gcc", "cc", "clang"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _cpu_quota() -> float | None:
    """CPU cores allowed by the container's control group, of cgroup version 2 or 1."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup/cpu")
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(quota) <= 0 else int(quota) / int(period)
    return None


def _free_memory() -> float | None:
    available = available_memory()
    return None if available is None else available.bytes / 2**30


def _gib_free(folder: Path) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**30
    except OSError:
        return None
