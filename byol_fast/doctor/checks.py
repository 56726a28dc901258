"""Checks of the environment, based on `SystemInfo`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from byol_fast.doctor.system_info import CUDA_DRIVERS, DALI_DRIVERS, SystemInfo

PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "broken"]
    """`note`: works, but could be better. `broken`: training fails, or does not use the hardware as it should."""
    result: str
    """The value or problem."""
    advice: str = ""
    """Remedy; empty if none is needed."""


def run_checks(info: SystemInfo) -> list[Check]:
    """All checks, the most important first."""
    return [
        *_check_versions(info),
        *_check_gpu(info),
        *_check_dali(info),
        *_check_kernels(info),
        *_check_cpu(info),
        *_check_space(info),
        _check_optional(info),
    ]


def _check_versions(info: SystemInfo) -> Iterator[Check]:
    name = ".".join(map(str, info.python))
    good = info.python in PYTHONS
    yield Check(
        "Python", "ok" if good else "note", f"{name}, {info.system}", "" if good else "supported: 3.11 and 3.12"
    )
    if info.torch is None:
        yield Check("torch", "broken", info.probes.get("torch", "cannot be imported"), "pip install torch")
        return
    built = f"for CUDA {info.torch_cuda}" if info.torch_cuda else "without CUDA"
    too_old = tuple(map(int, re.findall(r"\d+", info.torch)[:2])) < (2, 11)
    yield Check("torch", "broken" if too_old else "ok", f"{info.torch} {built}", "pip install 'torch>=2.11'" * too_old)
    if info.torchvision is None:
        problem = info.probes.get("torchvision", "cannot be imported")
        yield Check("torchvision", "broken", problem, f"install the version for torch {info.torch}")
    else:
        yield Check("torchvision", "ok", info.torchvision)


def _check_gpu(info: SystemInfo) -> Iterator[Check]:
    if info.gpus:
        yield Check("GPU", "ok", "; ".join(info.gpus))
    elif info.driver is None:
        yield Check(
            "GPU", "note", "none: training runs on the CPU", "sufficient for small images; use a GPU for large ones"
        )
    elif info.torch_cuda is None:
        advice = "install torch with CUDA: https://pytorch.org/get-started/locally"
        yield Check("GPU", "broken", f"present (driver {info.driver}), but torch was built without CUDA", advice)
    else:
        problem = info.probes.get("cuda", "torch cannot use it")
        advice = "update the driver, or start the container with --gpus all"
        yield Check("GPU", "broken", f"present (driver {info.driver}), but {problem}", advice)
    if info.driver is not None:
        required = {}
        if info.torch_cuda is not None:
            required["torch"] = CUDA_DRIVERS.get(info.torch_cuda.partition(".")[0], 0)
        if info.dali is not None:
            required[info.dali] = DALI_DRIVERS.get(info.dali.partition("==")[0], 0)
        major = int(info.driver.partition(".")[0])
        problems = [f"{package} requires {least}" for package, least in required.items() if major < least]
        advice = "update the driver, or install packages for an older CUDA (nvidia-dali-cuda120, torch for CUDA 12)"
        yield Check(
            "driver", "broken" if problems else "ok", ", ".join([info.driver, *problems]), advice if problems else ""
        )


def _check_dali(info: SystemInfo) -> Iterator[Check]:
    distribution = (
        "nvidia-dali-cuda130"
        if info.driver is None or int(info.driver.partition(".")[0]) >= 580
        else "nvidia-dali-cuda120"
    )
    if info.dali is None:
        advice = f"pip install {distribution}" if info.system.startswith("Linux") else ""
        effect = "the GPU would wait for decoding on the CPU" if info.gpus else "torchvision decodes instead"
        yield Check("DALI", "note", f"not installed: {effect}", advice)
        return
    cpu = info.probes.get("dali", "not tested")
    if cpu == "ok":
        yield Check("DALI", "ok", info.dali)
    else:  # optional on a CPU
        advice = f"pip install --force-reinstall {info.dali.partition('==')[0]}, or train with --data.loader threaded"
        yield Check("DALI", "broken" if info.gpus else "note", f"{info.dali}: {cpu}", advice)
    if info.gpus:
        gpu = info.probes.get("dali on the GPU", "not tested")
        if gpu == "ok":
            yield Check("DALI on the GPU", "ok", "decodes JPEGs")
        else:
            advice = "check the driver above; until then: --data.loader threaded"
            yield Check("DALI on the GPU", "broken", gpu, advice)


def _check_kernels(info: SystemInfo) -> Iterator[Check]:
    result = info.probes.get("kernels", "not tested")
    device = "GPU" if info.gpus else "CPU"
    if result == "ok":
        yield Check("kernels", "ok", f"correct loss on the {device}" + f", triton {info.triton}" * bool(info.gpus))
    else:
        advice = "pip install triton, and see the C compiler below" if info.gpus else "reinstall byol_fast"
        yield Check("kernels", "broken", result, advice)
    if info.compiler is None:
        advice = "apt install gcc g++ (or set CC)"
        if info.gpus:
            yield Check("C compiler", "broken", "none: required by Triton on a GPU", advice)
        else:
            yield Check("C compiler", "note", "none: --mode compile is not available", advice)
    else:
        yield Check("C compiler", "ok", info.compiler)


def _check_cpu(info: SystemInfo) -> Iterator[Check]:
    usable = info.cpus if info.cpu_quota is None else min(info.cpus, info.cpu_quota)
    cpu = f"{info.cpu}, {info.cpus} cores for this process"
    if usable < info.cpus:
        threads = max(1, round(usable))
        advice = f"--data.threads {threads} and OMP_NUM_THREADS={threads}: more threads compete for the cores"
        yield Check("CPU", "note", f"{cpu}, but the container may use only {usable:g}", advice)
    elif info.gpus and info.cpus < 4 * len(info.gpus):
        advice = "use four or more per GPU; see data_wait in metrics.jsonl"
        yield Check("CPU", "note", f"{cpu} for {len(info.gpus)} GPUs", advice)
    else:
        yield Check("CPU", "ok", cpu)
    cores = min(info.cpus, usable)
    # Two hyperthreads of a core count as two cores here: half as many threads, torch's default, are enough.
    few_threads = info.torch_threads == 1 < cores or 2 * info.torch_threads < cores
    if few_threads and not info.gpus:
        advice = "unset OMP_NUM_THREADS, unless the machine is shared"
        yield Check("threads", "note", f"torch uses {info.torch_threads} of {info.cpus} cores", advice)
    else:
        yield Check("threads", "ok", f"{info.torch_threads} (torch)")
    if not info.gpus:
        bf16 = "in hardware: used by default" if info.bf16 else "not in hardware: fp32 is used"
        yield Check("bf16 on the CPU", "ok", bf16)


def _check_space(info: SystemInfo) -> Iterator[Check]:
    if info.memory_gib is not None:
        low = info.memory_gib < 4
        advice = "use small batches and views, --data.threads 1"
        yield Check("memory", "note" if low else "ok", f"{info.memory_gib:.1f} GiB free", advice * low)
    if info.shm_gib is not None:
        low = info.shm_gib < 1 and len(info.gpus) > 1
        advice = "NCCL needs it: docker run --shm-size=8g"
        yield Check("shared memory", "note" if low else "ok", f"{info.shm_gib:.2f} GiB in /dev/shm", advice * low)
    if not info.writable:
        yield Check(
            "disk", "broken", "the current folder cannot be written", "change the folder, or train with --out FOLDER"
        )
    else:
        low = info.disk_gib < 5
        advice = "a ResNet-50 run stores four checkpoints of 0.42 GB; --out FOLDER sets another folder"
        yield Check("disk", "note" if low else "ok", f"{info.disk_gib:.1f} GiB free here", advice * low)
    if info.open_files is not None:
        low = info.open_files < 512
        yield Check("open files", "note" if low else "ok", f"up to {info.open_files}", "ulimit -n 4096" * low)


def _check_optional(info: SystemInfo) -> Check:
    installed = [f"{name} {number}" for name, number in info.optional.items() if number is not None]
    missing = [name for name, number in info.optional.items() if number is None]
    if missing:
        installed.append(f"not installed: {', '.join(missing)}")
    return Check("optional", "ok", ", ".join(installed) or "none")
