"""Items that look closely at the step: profile page, chosen kernels under ncu, power and clocks."""

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
from benchmarks.gpu.items.common import ROOT, byol_fast_step, free, is_small, link_copies, resnet50, same_flags
from benchmarks.gpu.items.timing import rounded
from byol_fast import config as configs
from byol_fast.bench.photographs import write_photographs
from byol_fast.config import recipes
from byol_fast.profiling import inductor
from byol_fast.profiling.run import profile as profile_run
from byol_fast.profiling.telemetry import Telemetry
from byol_fast.utils.files import atomic_write

BATCH = 256
POWER_SECONDS = 10.0
CHOSEN, LAUNCHES = 30, 300
"""Kernels that ncu looks at, and their launches at most."""
OURS = (
    *("_lars_norms_kernel", "_lars_apply_kernel", "_ema_update_kernel"),
    *("_normalized_mse_fwd_kernel", "_normalized_mse_bwd_kernel"),
)


def profile(context: Context) -> None:
    """`byol-fast profile` of ResNet-50, eager, so that its phases are seen and nothing has to be compiled."""
    small = is_small(context)
    with tempfile.TemporaryDirectory() as temporary:
        photographs = write_photographs(Path(temporary) / "photographs", 8 if small else 64)
        link_copies(context, photographs)
        changes: dict[str, Any] = {
            "data.root": photographs,
            "device": context.device,
            "mode": "eager",
            "precision": "bf16",
            "batch_size": 128,
            "steps": 1000,
            "out": Path(temporary) / "runs",
            "name": "profile",
        }
        if small:
            view = {"size": 32, "blur": 0.1}
            model = {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16}
            changes |= {"batch_size": 4, "view1": view, "view2": view, "model": model, "max_skipped_steps": 1000}
            changes |= {"data.loader": "torchvision"}  # no DALI on a GPU that is none
        found, folder = profile_run(configs.replace(recipes.imagenet_resnet50(), changes), steps=2 if small else 20)
        for kind in ("json", "html"):
            shutil.copy(folder / f"profile.{kind}", context.folder / f"profile.{kind}")
    step = found["step"]
    context.record(
        "byol_fast, eager, from JPEG",
        images_per_second=rounded(step["images_per_second"]),
        data_wait=rounded(step["data_wait"]),
        loader=found["backend"],
    )
    for phase in found["phases"]:
        seconds, floor = phase["seconds"], phase["floor_seconds"]
        values = {"ms": rounded(1e3 * seconds), "floor_ms": None if floor is None else rounded(1e3 * floor)}
        context.record(f"phase: {phase['phase']}", **values)
    for number, finding in enumerate(found["findings"], 1):
        context.record(f"finding {number}", text=finding["text"][:300], change=finding["change"][:300])


# ------------------------------------------------------------------------------------------------ ncu


def ncu(context: Context) -> None:
    """DRAM traffic, time and occupancy of chosen kernels of a compiled step."""
    pattern = chosen_kernels(context.folder.parent / "resnet50_compiled" / "kernels.json")
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--clock-control", "none", "--target-processes", "application-only"]
    command += ["--metrics", ",".join(inductor.NCU_METRICS)]
    command += ["--kernel-name", f"regex:{pattern}", "--launch-count", str(LAUNCHES)]
    command += [sys.executable, "-m", __name__, context.device, str(int(context.rehearsal)), str(context.folder)]
    free(context)
    limit = max(context.seconds_left() - 5.0, 1.0)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    atomic_write(context.folder / "ncu.csv", done.stdout)
    record_kernels(context, done.stdout, f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def chosen_kernels(times: Path) -> str:
    """A regular expression for the names of the kernels that take longest, and of byol_fast's.

    Args:
        times: file that the item `resnet50_compiled` has left; without it inductor's kernels are taken as they come.
    """
    if not times.exists():
        return f"^({'|'.join(OURS)}|triton_.*)$"
    # ncu matches the name of a function without namespaces, template arguments and parameters.
    names = [re.split(r"[<(]", kernel["kernel"])[0].split("::")[-1].split()[-1] for kernel in _listed(times)]
    return f"^({'|'.join(dict.fromkeys([*OURS, *map(re.escape, names)][:CHOSEN]))})$"


def _listed(times: Path) -> list[dict[str, Any]]:
    kernels: list[dict[str, Any]] = json.loads(times.read_text())
    return [kernel for kernel in kernels if not kernel["kernel"].lower().startswith(("memcpy", "memset"))]


def record_kernels(context: Context, table: str, problem: str) -> None:
    """Record what ncu has printed, a figure for each kernel.

    Args:
        context: of the item.
        table: what it printed.
        problem: to be raised where there is no table.
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
    """The program that ncu watches: one step of the compiled network, after two that warm up.

    Args:
        context: of the item.
    """
    step = byol_fast_step(context, resnet50(context, BATCH), "compile")
    same_flags()
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
    """Power, clocks and energy an image of a captured step that runs without a pause."""
    step = byol_fast_step(context, resnet50(context, BATCH), "graph")
    flags = same_flags()
    step()
    least = 0.1 if is_small(context) else POWER_SECONDS
    calls = 0
    with Telemetry(torch.device(context.device)) as telemetry:
        began = time.perf_counter()
        while time.perf_counter() - began < least:
            for _ in range(10):
                step()
            calls += 10
            if context.device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    images = calls * step.batch.views[0].shape[0]
    found = telemetry.record(images)
    gpu = found["gpu"] or {"problem": found["gpu_problem"]}
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
