"""Item: the environment and the ceilings of the device."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import free, is_small, skip_value_errors
from benchmarks.gpu.items.timing import rounded
from byol_fast.profiling.ceilings import Dtype, measure
from byol_fast.utils import env
from byol_fast.utils.telemetry import Telemetry

DTYPES: tuple[Dtype, ...] = ("bf16", "tf32", "fp32")


def run(context: Context) -> None:
    """Record versions and clocks, copy bandwidth and matrix products."""
    device = torch.device(context.device)
    record = env.describe_measurement(device)
    packages = record.pop("packages")
    context.record("environment", **record, **packages, cudnn=torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    for dtype in DTYPES[:1] if is_small(context) else DTYPES:
        with Telemetry(device) as telemetry, skip_value_errors(context, f"ceilings, {dtype}"):
            ceilings = measure(device, dtype, seconds=0.001 if is_small(context) else 0.15)
            context.record(
                f"ceilings, {dtype}",
                copy_gb_per_s=rounded(ceilings.bytes_per_s / 1e9),
                matmul_tflop_per_s=rounded(ceilings.flops_per_s / 1e12),
                data_sheet_tflop_per_s=rounded(ceilings.peak_flops_per_s / 1e12),
            )
        context.record(f"clocks, {dtype}", **_clocks(telemetry))
        free(context)


def _clocks(telemetry: Telemetry) -> dict[str, Any]:
    """Power and clocks during the measurement, or the reason why there are none."""
    record = telemetry.record(1)
    if record["gpu"] is None:
        return {"problem": record["gpu_problem"] or "too short for a sample"}
    return {name: rounded(value) for name, value in record["gpu"].items() if name != "energy_j_per_image"}
