"""What the machine says of itself while steps run: power, clocks, energy, cores, memory."""

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

PERIOD = 0.05
"""Seconds between two samples; NVML renews its power reading about as often."""


class Telemetry:
    """Samples a GPU through NVML, and the process through the operating system, within a `with` block.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problem: str | None = None
        """Why there are no figures of a GPU."""
        self._nvml, self._handle = self._open()
        self._samples: list[tuple[float, float, float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._begin: dict[str, float] = {}
        self._end: dict[str, float] = {}

    def __enter__(self) -> Telemetry:
        self._begin = self._counters()
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
        """What was seen, as plain JSON values.

        Args:
            images: that were trained on meanwhile.
        """
        spent = {name: self._end[name] - value for name, value in self._begin.items()}
        seconds = spent["wall"]
        cores = env.num_cpus()
        found: dict[str, Any] = {
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
            energy = spent.get("energy")
            found["gpu"] = {
                "power_w": statistics.fmean(power),
                "power_max_w": max(power),
                "power_limit_w": self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
                "sm_clock_mhz": statistics.fmean(clock),
                "sm_clock_max_mhz": self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": statistics.fmean(memory_clock),
                "temperature_c": max(temperature),
                "energy_j_per_image": (energy if energy else statistics.fmean(power) * seconds) / images,
            }
        return found

    def _open(self) -> tuple[Any, Any]:
        if self.device.type != "cuda":
            self.problem = "the run is on a CPU"
            return None, None
        try:
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

            pynvml.nvmlInit()
            # NVML counts all GPUs, CUDA those it was shown: the UUID is the same for both.
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
        found = {"wall": time.perf_counter(), "cpu": time.process_time()} | _machine()
        if self._handle is not None:
            try:
                found["energy"] = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
            except self._nvml.NVMLError:  # GPUs before Volta do not count it
                found["energy"] = 0.0
        return found


def others(record: dict[str, Any]) -> float:
    """Cores that other processes kept busy; 0 where the system does not say.

    Args:
        record: as `Telemetry.record` returns it.
    """
    busy = record["machine_busy"]
    return 0.0 if busy is None else max(busy * (os.cpu_count() or 1) - record["cores_used"], 0.0)


def _machine() -> dict[str, float]:
    """Time of all cores, and how much of it was idle, in ticks; zeros where the system does not say."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return {"machine": 0.0, "idle": 0.0}
    ticks = [float(x) for x in first]
    return {"machine": sum(ticks), "idle": ticks[3] + ticks[4]}


def memory_now(device: torch.device) -> int:
    """Bytes in use now: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
