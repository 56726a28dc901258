"""Power, clocks, energy, CPU use and memory while steps run."""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from byol_fast.utils import env
from byol_fast.utils.memory import resident_memory

PERIOD = 0.05
"""Seconds between two samples, about the update period of NVML's power reading."""


class Telemetry:
    """Samples a GPU by NVML and the process by the operating system, within a `with` block.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problem: str | None = None
        """Reason why there are no GPU values; None if there are."""
        self._nvml, self._handle = self._open()
        self._samples: list[tuple[float, float, float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}

    def __enter__(self) -> Telemetry:
        self._start = self._counters()
        if self._handle is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._end = self._counters()

    def record(self, images: int) -> dict[str, Any]:
        """The measurements as plain JSON values.

        Args:
            images: processed in the meantime.
        """
        spent = {name: self._end[name] - value for name, value in self._start.items()}
        seconds = spent["wall"]
        cores = env.num_cpus()
        record: dict[str, Any] = {
            "seconds": seconds,
            "cpu_seconds": spent["cpu"],
            "cores_used": spent["cpu"] / seconds,
            "cores": cores,
            "torch_threads": torch.get_num_threads(),
            "machine_busy": None if not spent["machine"] else 1 - spent["idle"] / spent["machine"],
            "gpu": None,
            "gpu_problem": self.problem,
        }
        if self._samples:
            power, clock, memory_clock, temperature = zip(*self._samples, strict=True)
            energy = spent["energy"]
            record["gpu"] = {
                "power_w": statistics.fmean(power),
                "power_max_w": max(power),
                "power_limit_w": self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
                "sm_clock_mhz": statistics.fmean(clock),
                "sm_clock_max_mhz": self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": statistics.fmean(memory_clock),
                "temperature_c": max(temperature),
                "energy_j_per_image": (energy if energy else statistics.fmean(power) * seconds) / images,
            }
        return record

    def energy(self) -> float | None:
        """Energy that the GPU has used since its driver was loaded, in joules; None if it is not known."""
        if self._handle is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:  # GPUs before Volta have no energy counter
            return None

    def _open(self) -> tuple[Any, Any]:
        if self.device.type != "cuda":
            self.problem = "the run is on a CPU"
            return None, None
        try:
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

            pynvml.nvmlInit()
            # NVML numbers all GPUs, CUDA only the visible ones; the UUID is the same for both.
            uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            self.problem = "NVML's Python package is missing: pip install nvidia-ml-py"
        except Exception as error:
            self.problem = f"NVML failed: {error}"
        return None, None

    def _sample(self) -> None:
        nvml, gpu = self._nvml, self._handle
        while not self._done.wait(PERIOD):
            self._samples.append(
                (
                    nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                    nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                    nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                    nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
                )
            )

    def _counters(self) -> dict[str, float]:
        counters = {"wall": time.perf_counter(), "cpu": time.process_time(), "energy": self.energy() or 0.0}
        return counters | _machine_ticks()


def other_cores(record: dict[str, Any]) -> float:
    """Number of cores kept busy by other processes; 0 if the system does not report it.

    Args:
        record: result of `Telemetry.record`.
    """
    busy = record["machine_busy"]
    return 0.0 if busy is None else max(busy * (os.cpu_count() or 1) - record["cores_used"], 0.0)


def _machine_ticks() -> dict[str, float]:
    """Total and idle time of all cores in ticks; zeros if the system does not report them."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return {"machine": 0.0, "idle": 0.0}
    ticks = [float(x) for x in first]
    return {"machine": sum(ticks), "idle": ticks[3] + ticks[4]}


def memory_now(device: torch.device) -> int:
    """Bytes in use: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return resident_memory()
