"""Facts about this machine: versions, GPU, DALI, CPU, memory and disk."""

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

DRIVERS = {"nvidia-dali-cuda130": 580, "nvidia-dali-cuda120": 525}
"""Oldest major version of NVIDIA's driver that a distribution of DALI runs with."""


CUDA_DRIVERS = {"13": 580, "12": 525}
"""The same for the CUDA that torch was built with, by its major version."""


PROBE_SECONDS = 300


@dataclass(kw_only=True, slots=True)
class Facts:
    """What was found on the machine; `judge` says what to think of it."""

    python: tuple[int, int] = (0, 0)
    system: str = ""
    torch: str | None = None
    torch_cuda: str | None = None
    """CUDA version that torch was built with; None for a build without."""
    torchvision: str | None = None
    triton: str | None = None
    gpus: list[str] = field(default_factory=list)
    """Those that torch can use."""
    driver: str | None = None
    """NVIDIA's driver, whether torch can use it or not."""
    dali: str | None = None
    """Which distribution of DALI is installed, and its version: `name==version`."""
    probes: dict[str, str] = field(default_factory=dict)
    """What was tried in another process: `ok` or what went wrong, by name."""
    compiler: str | None = None
    cpu: str = ""
    cpus: int = 1
    cpu_quota: float | None = None
    """CPU cores that a container may keep busy; None for no limit."""
    torch_threads: int = 1
    bf16: bool = False
    memory_gib: float | None = None
    shm_gib: float | None = None
    disk_gib: float = 0.0
    """Free below the current folder, where runs are written."""
    writable: bool = True
    """Whether files can be made there."""
    open_files: int | None = None
    optional: dict[str, str | None] = field(default_factory=dict)
    """Packages that some options need, by name."""


# ---- the facts -----------------------------------------------------------------------------------------------------


def gather() -> Facts:
    """Look at this machine. What might end a process is tried in another one."""
    f = Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        system=f"{platform.system()} {platform.machine()}",
        triton=version("triton"),
        dali=next((f"{name}=={found}" for name in DRIVERS if (found := version(name)) is not None), None),
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
    f.probes = _probe_elsewhere()
    f.torch = f.probes.pop("torch version", None)
    f.torch_cuda = f.probes.pop("torch cuda", None)
    f.torchvision = f.probes.pop("torchvision version", None)
    f.torch_threads = int(f.probes.pop("torch threads", "1"))
    f.gpus = [f.probes.pop(name) for name in sorted(f.probes) if name.startswith("gpu ")]
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        f.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f


def _probe_elsewhere() -> dict[str, str]:
    """Run `probe` in a process of its own: a broken driver or DALI may end or hang it."""
    command = [sys.executable, "-c", "from byol_fast.doctor.system_info import probe; probe()"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        output, ending = ended.stdout, f"the process ended with {ended.returncode}: {_last_line(ended.stderr)}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        output = said.decode(errors="replace") if isinstance(said, bytes) else said
        ending = f"nothing happened for {PROBE_SECONDS} s"
    results: dict[str, str] = {}
    under_way = None
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError, ValueError):
            name, said = json.loads(line)
            if said is None:
                under_way = name
            else:
                results[name] = said
                under_way = None if name == under_way else under_way
    if under_way is not None:
        results[under_way] = ending
    return results


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def probe() -> None:
    """Try what might fail, and print what came of it: JSON, one `[name, outcome]` a line, null when it begins."""

    def tell(name: str, outcome: str | None) -> None:
        print(json.dumps([name, outcome]), flush=True)

    def attempt(name: str, action: Callable[[], None]) -> bool:
        tell(name, None)
        try:
            action()
        except Exception as error:  # whatever it is, it is the report
            tell(name, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
            return False
        tell(name, "ok")
        return True

    if not attempt("torch", lambda: _probe_torch(tell)):
        return
    attempt("torchvision", lambda: _probe_torchvision(tell))
    has_gpu = attempt("cuda", lambda: _probe_cuda(tell))
    attempt("kernels", lambda: _probe_kernels("cuda" if has_gpu else "cpu"))
    if any(version(name) for name in DRIVERS):
        attempt("dali", lambda: _probe_dali("cpu"))
        if has_gpu:
            attempt("dali on the GPU", lambda: _probe_dali("mixed"))


def _probe_torch(tell: Callable[[str, str | None], None]) -> None:
    import torch

    tell("torch version", torch.__version__)
    if torch.version.cuda is not None:
        tell("torch cuda", torch.version.cuda)
    tell("torch threads", str(torch.get_num_threads()))


def _probe_torchvision(tell: Callable[[str, str | None], None]) -> None:
    import torchvision.transforms.v2.functional

    tell("torchvision version", torchvision.__version__)


def _probe_cuda(tell: Callable[[str, str | None], None]) -> None:
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        tell(
            f"gpu {number:03d}",
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}",
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
    off = float(np.abs(images.as_array()[0].astype(float) - ramp).mean())
    if off > 4:
        raise ArithmeticError(f"a JPEG is decoded {off:.1f} levels off")


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        match = re.search(r"Module\D*(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if match is not None:
            return match[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        if match := re.match(r"\d+\.[\d.]+", said):
            return match[0]
    return None


def _compiler() -> str | None:
    names = [*os.environ.get("CC", "").split()[:1], "gcc", "cc", "clang"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _cpu_quota() -> float | None:
    """CPU cores that a container's control group allows, by cgroup 2, else 1."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup/cpu")
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(quota) <= 0 else int(quota) / int(period)
    return None


def _free_memory() -> float | None:
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if match is not None:
            return int(match[1]) / 2**20
    return None


def _gib_free(folder: Path) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**30
    except OSError:
        return None
