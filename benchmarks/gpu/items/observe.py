"""Items: profile page, the heaviest kernels under ncu, power and clocks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.item import Context, Item
from benchmarks.gpu.items.common import ROOT, byol_fast_step, free, is_small, link_copies, resnet50, set_flags
from benchmarks.gpu.items.timing import rounded
from byol_fast import config as configs
from byol_fast.bench.synthetic_jpegs import write_synthetic_jpegs
from byol_fast.config import recipes
from byol_fast.profiling import inductor
from byol_fast.profiling.run import profile as profile_run
from byol_fast.utils.files import atomic_write
from byol_fast.utils.telemetry import Telemetry

BATCH = 256
POWER_SECONDS = 10.0
MAX_KERNELS, MAX_LAUNCHES = 30, 300
"""Limits of the kernels and launches that ncu measures."""
BYOL_KERNELS = (
    *("_lars_norms_kernel", "_lars_apply_kernel", "_ema_update_kernel"),
    *("_normalized_mse_fwd_kernel", "_normalized_mse_bwd_kernel"),
)


def profile(context: Context) -> None:
    """Run `byol-fast profile` on ResNet-50, eager, which shows the phases and needs no compilation."""
    small = is_small(context)
    with tempfile.TemporaryDirectory() as temporary:
        images = write_synthetic_jpegs(Path(temporary) / "images", 8 if small else 64)
        link_copies(context, images)
        changes: dict[str, Any] = {
            "data.root": images,
            "device": context.device,
            "mode": "eager",
            "precision": "bf16",
            "batch_size": 128,
            "steps": 1000,
            "out": Path(temporary) / "runs",
            "name": "profile",
        }
        if small:
            view = {"size": 32, "blur_p": 0.1}
            model = {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16}
            changes |= {"batch_size": 4, "view1": view, "view2": view, "model": model, "max_skipped_steps": 1000}
            changes |= {"data.loader": "threaded"}  # DALI needs a real GPU
        record, folder = profile_run(configs.replace(recipes.imagenet_resnet50(), changes), steps=2 if small else 20)
        for kind in ("json", "html"):
            shutil.copy(folder / f"profile.{kind}", context.folder / f"profile.{kind}")
    step = record["step"]
    context.record(
        "byol_fast, eager, from JPEG",
        images_per_second=rounded(step["images_per_second"]),
        data_wait=rounded(step["data_wait"]),
        loader=record["loader"],
    )
    for phase in record["phases"]:
        seconds, floor = phase["seconds"], phase["floor_seconds"]
        values = {"ms": rounded(1e3 * seconds), "floor_ms": None if floor is None else rounded(1e3 * floor)}
        context.record(f"phase: {phase['phase']}", **values)
    for number, finding in enumerate(record["findings"], 1):
        context.record(f"finding {number}", text=finding["text"][:300], change=finding["change"][:300])


# ------------------------------------------------------------------------------------------------ ncu


def ncu(context: Context) -> None:
    """Record DRAM traffic, time and occupancy of the heaviest kernels of a compiled step."""
    pattern = kernel_pattern(context.folder.parent / "resnet50_compiled" / "kernels.json")
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--clock-control", "none", "--target-processes", "application-only"]
    command += ["--metrics", ",".join(inductor.NCU_METRICS)]
    command += ["--kernel-name", f"regex:{pattern}", "--launch-count", str(MAX_LAUNCHES)]
    command += [sys.executable, "-m", __name__, context.device, str(int(context.rehearsal)), str(context.folder)]
    free(context)
    limit = max(context.seconds_left() - 5.0, 1.0)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    atomic_write(context.folder / "ncu.csv", process.stdout)
    record_kernels(context, process.stdout, f"exit code {process.returncode}: {process.stderr.strip()[-500:]}")


def kernel_pattern(times: Path) -> str:
    """Regular expression for the names of the longest kernels and of byol_kernels.

    Args:
        times: file written by the item `resnet50_compiled`; without it, all kernels of inductor match.
    """
    if not times.exists():
        return f"^({'|'.join(BYOL_KERNELS)}|triton_.*)$"
    # ncu matches the name of a function without namespaces, template arguments and parameters.
    listed = [kernel["kernel"].replace("(anonymous namespace)::", "") for kernel in _listed(times)]
    names = [re.split(r"[<(]", name)[0].split("::")[-1].split()[-1] for name in listed]
    return f"^({'|'.join(dict.fromkeys([*BYOL_KERNELS, *map(re.escape, names)][:MAX_KERNELS]))})$"


def _listed(times: Path) -> list[dict[str, Any]]:
    kernels: list[dict[str, Any]] = json.loads(times.read_text())
    return [kernel for kernel in kernels if not kernel["kernel"].lower().startswith(("memcpy", "memset"))]


def record_kernels(context: Context, table: str, problem: str) -> None:
    """Record the output of ncu, a figure per kernel.

    Args:
        context: of the item.
        table: output of ncu.
        problem: message if it holds no table.
    """
    kernels = inductor.read_ncu(table)
    if not kernels:
        raise RuntimeError(f"ncu: no table in {context.folder / 'ncu.csv'}; {problem}")
    for kernel in kernels:
        context.record(
            f"ncu: {kernel['kernel'][:100]}",
            launches=kernel["launches"],
            read_gb=rounded(kernel["read_bytes"] / 1e9),
            written_gb=rounded(kernel["written_bytes"] / 1e9),
            ms=rounded(kernel["seconds"] * 1e3),
            gb_per_s=rounded(kernel["gb_per_s"]),
            occupancy_percent=rounded(kernel["occupancy_percent"]),
        )
    for family in inductor.by_family(kernels):
        values = {name: rounded(family[name]) for name in ("gb", "ms")}
        context.record(f"ncu, family: {family['family']}", launches=family["launches"], **values)


def one_step(context: Context) -> None:
    """The program measured by ncu: one step of the compiled network after two warm-up steps.

    Args:
        context: of the item.
    """
    step = byol_fast_step(context, resnet50(context, BATCH), "compile")
    set_flags()
    for _ in range(2):
        step()
    if context.device != "cuda":
        step()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------ power


def power(context: Context) -> None:
    """Record power, clocks and energy per image of a captured step that runs without a pause."""
    step = byol_fast_step(context, resnet50(context, BATCH), "graph")
    flags = set_flags()
    step()
    least = 0.1 if is_small(context) else POWER_SECONDS
    calls = 0
    with Telemetry(torch.device(context.device)) as telemetry:
        start = time.perf_counter()
        while time.perf_counter() - start < least:
            for _ in range(10):
                step()
            calls += 10
            if context.device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    images = calls * step.batch.views[0].shape[0]
    record = telemetry.record(images)
    gpu = record["gpu"] or {"problem": record["gpu_problem"]}
    context.record(
        f"byol_fast, captured, batch {step.batch.views[0].shape[0]}, without a pause",
        images_per_second=rounded(images / seconds),
        seconds=rounded(seconds),
        **{name: rounded(value) if isinstance(value, float) else value for name, value in gpu.items()},
        **flags,
    )


if __name__ == "__main__":
    device, rehearsal, folder = sys.argv[1:]
    item = Item(name="ncu", question="", run="", seconds=0.0, depends_on=())
    one_step(
        Context(
            item,
            Path(folder) / "records.jsonl",
            Path(folder),
            device=device,
            rehearsal=bool(int(rehearsal)),
            deadline=float("inf"),
        )
    )
