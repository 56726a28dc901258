"""`byol-fast doctor`: whether this machine can train, how fast, and what to do about what is missing."""

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from byol_fast.config import Config, ConfigError, DataConfig, KNNConfig
from byol_fast.environment import cpu_has_bf16, cpu_name, num_cpus, version

PYTHONS = ((3, 11), (3, 12))
DRIVERS = {"nvidia-dali-cuda130": 580, "nvidia-dali-cuda120": 525}
"""Oldest major version of NVIDIA's driver that a distribution of DALI runs with."""
CUDA_DRIVERS = {"13": 580, "12": 525}
"""The same for the CUDA that torch was built with, by its major version."""
PROBE_SECONDS = 300
PLAIN_WIDTH = 120
"""Columns of the report where there is no terminal."""
SHOWN = 20
"""Bad images that are named; `--json` names all."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "broken"]
    """`note`: works, but could be better. `broken`: training cannot work, or not as the hardware should."""
    found: str
    advice: str = ""
    """What to do about it."""


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


def judge(f: Facts) -> list[Check]:
    """What to think of the facts, one line for each, the most important first."""
    return [
        *_judge_versions(f),
        *_judge_gpu(f),
        *_judge_dali(f),
        *_judge_kernels(f),
        *_judge_cpu(f),
        *_judge_room(f),
        _judge_optional(f),
    ]


def _judge_versions(f: Facts) -> Iterator[Check]:
    name = ".".join(map(str, f.python))
    good = f.python in PYTHONS
    yield Check("Python", "ok" if good else "note", f"{name}, {f.system}", "" if good else "tested are 3.11 and 3.12")
    if f.torch is None:
        yield Check("torch", "broken", f.probes.get("torch", "cannot be imported"), "pip install torch")
        return
    built = f"for CUDA {f.torch_cuda}" if f.torch_cuda else "without CUDA"
    too_old = tuple(map(int, re.findall(r"\d+", f.torch)[:2])) < (2, 11)
    yield Check("torch", "broken" if too_old else "ok", f"{f.torch} {built}", "pip install 'torch>=2.11'" * too_old)
    if f.torchvision is None:
        said = f.probes.get("torchvision", "cannot be imported")
        yield Check("torchvision", "broken", said, f"install the version that belongs to torch {f.torch}")
    else:
        yield Check("torchvision", "ok", f.torchvision)


def _judge_gpu(f: Facts) -> Iterator[Check]:
    if f.gpus:
        yield Check("GPU", "ok", "; ".join(f.gpus))
    elif f.driver is None:
        yield Check("GPU", "note", "none: training runs on the CPU", "fine for small images; large ones want a GPU")
    elif f.torch_cuda is None:
        advice = "install torch with CUDA: https://pytorch.org/get-started/locally"
        yield Check("GPU", "broken", f"there is one (driver {f.driver}), but torch was built without CUDA", advice)
    else:
        said = f.probes.get("cuda", "torch cannot use it")
        advice = "update the driver, or check that the container was started with --gpus all"
        yield Check("GPU", "broken", f"there is one (driver {f.driver}), but {said}", advice)
    if f.driver is not None:
        needs = {}
        if f.torch_cuda is not None:
            needs["torch"] = CUDA_DRIVERS.get(f.torch_cuda.partition(".")[0], 0)
        if f.dali is not None:
            needs[f.dali] = DRIVERS.get(f.dali.partition("==")[0], 0)
        old = [f"{who} needs {least}" for who, least in needs.items() if int(f.driver.partition(".")[0]) < least]
        advice = "update the driver, or install packages for an older CUDA (nvidia-dali-cuda120, torch for CUDA 12)"
        yield Check("driver", "broken" if old else "ok", ", ".join([f.driver, *old]), advice if old else "")


def _judge_dali(f: Facts) -> Iterator[Check]:
    wanted = (
        "nvidia-dali-cuda130" if f.driver is None or int(f.driver.partition(".")[0]) >= 580 else "nvidia-dali-cuda120"
    )
    if f.dali is None:
        advice = f"pip install {wanted}" if f.system.startswith("Linux") else ""
        why = "the GPU would wait for CPU threads to decode" if f.gpus else "torchvision decodes instead"
        yield Check("DALI", "note", f"not installed: {why}", advice)
        return
    cpu = f.probes.get("dali", "was not tried")
    if cpu == "ok":
        yield Check("DALI", "ok", f.dali)
    else:  # on a CPU nothing needs it
        advice = f"pip install --force-reinstall {f.dali.partition('==')[0]}, or train with --data.loader torchvision"
        yield Check("DALI", "broken" if f.gpus else "note", f"{f.dali}: {cpu}", advice)
    if f.gpus:
        gpu = f.probes.get("dali on the GPU", "was not tried")
        if gpu == "ok":
            yield Check("DALI on the GPU", "ok", "decodes JPEGs")
        else:
            advice = "check the driver above; until then: --data.loader torchvision"
            yield Check("DALI on the GPU", "broken", gpu, advice)


def _judge_kernels(f: Facts) -> Iterator[Check]:
    said = f.probes.get("kernels", "were not tried")
    where = "GPU" if f.gpus else "CPU"
    if said == "ok":
        yield Check("kernels", "ok", f"give the right loss on the {where}" + f", triton {f.triton}" * bool(f.gpus))
    else:
        advice = "pip install triton, and see the C compiler below" if f.gpus else "reinstall byol_fast"
        yield Check("kernels", "broken", said, advice)
    if f.compiler is None:
        advice = "apt install gcc g++ (or set CC)"
        if f.gpus:
            yield Check("C compiler", "broken", "none: Triton needs one on a GPU", advice)
        else:
            yield Check("C compiler", "note", "none: no --mode compile, and slower loss, LARS and blur", advice)
    else:
        yield Check("C compiler", "ok", f.compiler)
    compiled = f.probes.get("CPU kernels", "ok")
    if compiled != "ok" and f.compiler is not None:
        advice = "only speed is lost; CC=gcc names another compiler, XDG_CACHE_HOME another folder for what it makes"
        yield Check("CPU kernels", "note", f"loss, LARS and blur take slower operators: {compiled}", advice)


def _judge_cpu(f: Facts) -> Iterator[Check]:
    usable = f.cpus if f.cpu_quota is None else min(f.cpus, f.cpu_quota)
    found = f"{f.cpu}, {f.cpus} cores for this process"
    if usable < f.cpus:
        threads = max(1, round(usable))
        advice = f"--data.threads {threads}, and OMP_NUM_THREADS={threads}: more threads only get in each other's way"
        yield Check("CPU", "note", f"{found}, but the container may keep only {usable:g} busy", advice)
    elif f.gpus and f.cpus < 4 * len(f.gpus):
        advice = "four or more a GPU decode ahead of it; see data_wait in metrics.jsonl"
        yield Check("CPU", "note", f"{found} for {len(f.gpus)} GPUs", advice)
    else:
        yield Check("CPU", "ok", found)
    if f.torch_threads < min(f.cpus, usable) and not f.gpus:
        advice = "unset OMP_NUM_THREADS, unless other work shares the machine"
        yield Check("threads", "note", f"torch computes with {f.torch_threads} of {f.cpus} cores", advice)
    else:
        yield Check("threads", "ok", f"{f.torch_threads} of torch")
    if not f.gpus:
        found = "in hardware: runs use it" if f.bf16 else "not in hardware: runs use fp32"
        yield Check("bf16 on the CPU", "ok", found)


def _judge_room(f: Facts) -> Iterator[Check]:
    if f.memory_gib is not None:
        low = f.memory_gib < 4
        advice = "small batches and views, --data.threads 1"
        yield Check("memory", "note" if low else "ok", f"{f.memory_gib:.1f} GiB free", advice * low)
    if f.shm_gib is not None:
        low = f.shm_gib < 1 and len(f.gpus) > 1
        advice = "NCCL shares memory there: docker run --shm-size=8g"
        yield Check("shared memory", "note" if low else "ok", f"{f.shm_gib:.2f} GiB in /dev/shm", advice * low)
    if not f.writable:
        yield Check(
            "disk", "broken", "the current folder cannot be written", "go elsewhere, or train with --out FOLDER"
        )
    else:
        low = f.disk_gib < 5
        advice = "a ResNet-50 run keeps four checkpoints of 0.42 GB; --out FOLDER puts it elsewhere"
        yield Check("disk", "note" if low else "ok", f"{f.disk_gib:.1f} GiB free here", advice * low)
    if f.open_files is not None:
        low = f.open_files < 512
        yield Check("open files", "note" if low else "ok", f"up to {f.open_files}", "ulimit -n 4096" * low)


def _judge_optional(f: Facts) -> Check:
    have = [f"{name} {number}" for name, number in f.optional.items() if number is not None]
    lack = [name for name, number in f.optional.items() if number is None]
    found = ", ".join([*have, *([f"not installed: {', '.join(lack)}"] if lack else [])])
    return Check("optional", "ok", found or "none asked for")


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
    command = [sys.executable, "-c", "from byol_fast.doctor import probe; probe()"]
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
    if attempt("kernels", lambda: _probe_kernels("cuda" if has_gpu else "cpu")) and not has_gpu:
        attempt("CPU kernels", _probe_compiled)
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


def _probe_compiled() -> None:
    from byol_kernels import _cpu

    found = _cpu.compiled()
    if found.library is None:
        raise RuntimeError(found.note)


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


# ---- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanData:
    """Images to look at."""

    root: Path | None = None
    """Whatever `byol-fast train --data.root` takes: every image is decoded, and the bad ones are named."""
    cache: Path = Path("~/.cache/byol_fast")
    """Folder for indexes of tar shards and the images of Parquet files."""
    image_column: str = ""
    """As for training."""
    label_column: str = ""
    """As for training."""
    threads: int = 0
    """Decoding threads; 0 means one per CPU core."""


def scan_data(data: ScanData, *, fast: bool, console: Console) -> dict[str, Any]:
    """Look at training and validation images, and print what was found.

    Returns:
        A `Scan` as plain values for `training`, and for `validation` where there are such images.

    Raises:
        SourceError: there are no images.
    """
    from byol_fast.data import split
    from byol_fast.data.scan import scan

    options = DataConfig(
        root=data.root, cache=data.cache, image_column=data.image_column, label_column=data.label_column
    )
    parts = zip(("training", "validation"), split(Config(data=options, knn=KNNConfig())), strict=True)
    found: dict[str, Any] = {}
    for name, source in parts:
        if source is None:
            continue
        columns = (TextColumn(f"{name} images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=len(source))
            result = scan(
                source,
                threads=data.threads or num_cpus(),
                fast=fast,
                progress=lambda count, progress=progress, bar=bar: progress.advance(bar, count),  # type: ignore[misc]
            )
        found[name] = result.as_dict()
        _print_scan(name, found[name], console)
    return found


def _print_scan(name: str, found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{name} images: {found['source']}", show_header=False, title_justify="left")
    how = f"{found['decoded']:,} of {found['images']:,} decoded in {found['seconds']:.1f} s"
    table.add_row("images", how)
    for side, values in found["pixels"].items():
        table.add_row(f"{side}, pixels", ", ".join(f"{key} {value}" for key, value in values.items()))
    if counts := found["classes"]:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        table.add_row("classes", f"{len(counts)}: from {counts[least]:,} images ({least}) to {counts[most]:,} ({most})")
    else:
        table.add_row("classes", "no labels: train works, kNN and linear evaluation need them")
    bad = found["bad"]
    table.add_row("cannot be read", f"[red]{len(bad):,}[/red]" if bad else "[green]none[/green]")
    console.print(table)
    for entry in bad[:SHOWN]:
        console.print(f"{entry['image']} {entry['reason']}", soft_wrap=True, markup=False, style="red")
    if bad:
        more = f"{len(bad) - SHOWN} more: see --json. " if len(bad) > SHOWN else ""
        advice = "Replace them or remove them, or train with --data.on-bad skip."
        console.print(more + advice, soft_wrap=True, markup=False)


# ---- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Check whether this machine can train, and that every image can be read."""

    data: ScanData = field(default_factory=ScanData)
    """Images to look at."""
    fast: bool = False
    """Look only at the ends of each image file: finds what was cut off or is no image, in 16 us each."""
    json: bool = False
    """Print the report as JSON."""


def examine(options: Options) -> int:
    """Check this machine, and images where some are given; print a report.

    Returns:
        0, or 1 when something required is broken or an image cannot be read.
    """
    data, fast, as_json = options.data, options.fast, options.json
    if fast and data.root is None:
        raise ConfigError("doctor: --fast is about images; give --data.root too")
    console = Console(highlight=False, quiet=as_json, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    checks = judge(gather())
    table = Table(title="this machine", title_justify="left")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}
    for check in checks:
        table.add_row(marks[check.status], check.name, check.found.replace("[", r"\["), check.advice)
    console.print(table)
    usable = all(check.status != "broken" for check in checks)
    images = scan_data(data, fast=fast, console=console) if data.root is not None else {}
    readable = not any(part["bad"] for part in images.values())
    if as_json:
        report = {"usable": usable, "checks": [asdict(check) for check in checks], "images": images}
        print(json.dumps(report, indent=2))
    elif usable:
        console.print("This machine can train." if readable else "This machine can train; some images cannot be read.")
    else:
        broken = ", ".join(check.name for check in checks if check.status == "broken")
        console.print(f"[red]Something required is broken: {broken}.[/red]")
    return 0 if usable and readable else 1
