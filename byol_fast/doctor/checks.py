"""Checks of a machine, each a judgement on the facts of `system_info`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from byol_fast.doctor.system_info import CUDA_DRIVERS, DRIVERS, Facts

PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "broken"]
    """`note`: works, but could be better. `broken`: training cannot work, or not as the hardware should."""
    found: str
    advice: str = ""
    """What to do about it."""


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
        advice = f"pip install --force-reinstall {f.dali.partition('==')[0]}, or train with --data.loader threaded"
        yield Check("DALI", "broken" if f.gpus else "note", f"{f.dali}: {cpu}", advice)
    if f.gpus:
        gpu = f.probes.get("dali on the GPU", "was not tried")
        if gpu == "ok":
            yield Check("DALI on the GPU", "ok", "decodes JPEGs")
        else:
            advice = "check the driver above; until then: --data.loader threaded"
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
            yield Check("C compiler", "note", "none: no --mode compile", advice)
    else:
        yield Check("C compiler", "ok", f.compiler)


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
