"""Findings of a profile: what slows the run down, and how to change it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MIN_DATA_WAIT = 0.10
"""Share of a step spent waiting for images; less is the noise of a loader that keeps up."""
MIN_BATCH_GAIN = 1.4
"""Speed-up per image in a batch twice as large, above which the fixed costs of a step dominate."""
MIN_BF16_GAIN = 1.15
"""Speed-up of forward and backward in bf16."""
MIN_CORES_GAIN = 1.1
"""Speed-up of forward and backward on all cores."""
MIN_GPU_IDLE = 0.15
"""Share of the time in which no kernel runs."""
MIN_SIDE_WORK = 0.05
"""Share of a step spent on metrics or callbacks."""
MAX_OTHER_CORES = 0.3
"""Cores kept busy by other processes; above, values of a CPU are unreliable."""
LOW_MEMORY_USE = 0.45
"""Share of a GPU's memory below which twice the batch fits."""
POWER_LIMITED = 0.97
"""Share of the power limit above which, and share of the maximum clock below which, a GPU is limited by power."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause of lost time, and its remedy."""

    kind: str
    """`slow data`, `one thread`, `tiny batch`, `precision`, `host sync`, `host-bound`, ..."""
    share: float
    """Share of the step's time that it costs, measured or estimated from measurements; findings are sorted by it."""
    text: str
    """The measurement."""
    change: str
    """The remedy."""


def findings(profile: dict[str, Any]) -> list[Finding]:
    """All findings of a profile, the most expensive first.

    Args:
        profile: result of `byol_fast.profiling.profile`.
    """
    parts = (_data, _threads, _batch_size, _precision, _host_syncs, _side_work, _gpu)
    return sorted((finding for part in parts for finding in part(profile)), key=lambda finding: -finding.share)


def _data(profile: dict[str, Any]) -> Iterator[Finding]:
    share = profile["step"]["data_wait"]
    if share < MIN_DATA_WAIT:
        return
    data, cores = profile["config"]["data"], profile["machine"]["cores"]
    threads = data["threads"] or cores
    if threads < cores:
        change = f"raise data.threads (now {threads} of {cores} cores)"
    elif profile["on_cpu"]:
        change = "loading and training share the cores: smaller images, or arrays (.npz), or more cores"
    else:
        change = (
            f"all {cores} cores prepare images already: more cores per GPU, data.loader dali, or device_cache for "
            "small data; smaller originals decode faster"
        )
    yield Finding(
        "slow data",
        share,
        f"data-bound: {share:.0%} of the step waits for images ({profile['loader']} loader, {threads} threads)",
        change,
    )


def _threads(profile: dict[str, Any]) -> Iterator[Finding]:
    threads, cores = profile["machine"]["torch_threads"], profile["machine"]["cores"]
    experiment = profile["probes"]["all_cores"]
    if experiment is None:
        return
    is_disturbed = experiment["others"] >= MAX_OTHER_CORES
    if not is_disturbed and experiment["gain"] < MIN_CORES_GAIN:
        return
    share = 0.0 if is_disturbed else 1 - 1 / experiment["gain"]
    effect = (
        "the gain of more cannot be measured while other processes keep them busy"
        if is_disturbed
        else f"on all of them forward and backward take {share:.0%} less time"
    )
    yield Finding(
        "one thread" if threads == 1 else "few threads",
        share,
        f"torch uses {threads} of {cores} cores; {effect}",
        f"set OMP_NUM_THREADS={cores} (or unset it), or call torch.set_num_threads({cores})",
    )


def _batch_size(profile: dict[str, Any]) -> Iterator[Finding]:
    gain, batch_size = profile["probes"]["double_batch"], profile["batch_size"]
    if gain is not None and gain >= MIN_BATCH_GAIN:
        share = 1 - 1 / gain
        yield Finding(
            "tiny batch",
            share,
            f"with a batch size of {2 * batch_size} instead of {batch_size} an image takes {share:.0%} less time: "
            "the fixed costs of a step dominate",
            f"raise batch_size to {2 * batch_size} or more (the learning rate scales with it)",
        )


def _precision(profile: dict[str, Any]) -> Iterator[Finding]:
    gain = profile["probes"]["bf16"]
    if gain is not None and gain >= MIN_BF16_GAIN:
        yield Finding(
            "precision",
            1 - 1 / gain,
            f"forward and backward take {1 - 1 / gain:.0%} less time in bf16 than in {profile['precision']}",
            "set precision to bf16 (or auto)",
        )


def _host_syncs(profile: dict[str, Any]) -> Iterator[Finding]:
    for sync in profile["probes"]["host_syncs"]:
        cost = "free on this CPU, but the host of a GPU" if profile["on_cpu"] else "the host"
        yield Finding(
            "host sync",
            0.02 if profile["on_cpu"] else profile["gpu"]["idle"],
            f"{sync['per_step']} times per step a value is read from the device at {sync['place']}: {cost} waits for "
            "it and launches no kernels meanwhile",
            "keep the value a tensor (torch.where instead of if), or read it once every log_every steps",
        )


def _side_work(profile: dict[str, Any]) -> Iterator[Finding]:
    for phase, change in (
        ("metrics", f"raise log_every (now {profile['config']['log_every']})"),
        ("callbacks", "do less in on_step_end, or do it less often"),
    ):
        share = _share(profile, phase)
        if share >= MIN_SIDE_WORK:
            yield Finding(phase, share, f"{phase} take {share:.0%} of the step", change)


def _gpu(profile: dict[str, Any]) -> Iterator[Finding]:
    gpu, telemetry = profile["gpu"], profile["machine"]["gpu"]
    if gpu is None:
        return
    waits = profile["step"]["data_wait"] + _share(profile, "metrics") + _share(profile, "callbacks")
    launch_bound = gpu["idle"] - waits
    if launch_bound >= MIN_GPU_IDLE:
        yield Finding(
            "host-bound",
            launch_bound,
            f"GPU idle {gpu['idle']:.0%} ({launch_bound:.0%} not waiting for data): launch-bound, "
            f"{gpu['launches']:.0f} kernels per step",
            "raise batch_size" if profile["mode"] == "graph" else "set mode to graph, or raise batch_size",
        )
    memory_use = gpu["peak_bytes"] / gpu["memory_bytes"]
    if memory_use < LOW_MEMORY_USE:
        yield Finding(
            "memory to spare",
            0.0,
            f"{memory_use:.0%} of the GPU's memory is used",
            "a larger batch_size would fit" + ("; turn activation_checkpointing off" if gpu["checkpointing"] else ""),
        )
    if telemetry is not None and telemetry["power_w"] >= POWER_LIMITED * telemetry["power_limit_w"]:
        slowdown = 1 - telemetry["sm_clock_mhz"] / telemetry["sm_clock_max_mhz"]
        if slowdown >= 1 - POWER_LIMITED:
            yield Finding(
                "power limit",
                slowdown,
                f"the GPU is at its power limit ({telemetry['power_limit_w']:.0f} W), its clock {slowdown:.0%} below "
                "the maximum",
                "raise the limit (nvidia-smi -pl) if permitted, or compare with runs at the same limit",
            )


def _share(profile: dict[str, Any], phase: str) -> float:
    return float(sum(row["share"] for row in profile["phases"] if row["phase"] == phase))


def notes(profile: dict[str, Any]) -> list[str]:
    """Limits of the measurement."""
    lines = []
    machine, roofline = profile["machine"], profile["roofline"]
    if profile["on_cpu"] and machine["others"] >= MAX_OTHER_CORES:
        lines.append(
            f"Other processes kept {machine['others']:.1f} of {machine['cores']} cores busy: repeat the profile on an "
            "idle machine."
        )
    if faster := {row["phase"]: row["above_ceilings"] for row in profile["phases"] if row.get("above_ceilings")}:
        lines.append(
            f"Faster than the measured ceilings allow, by at most {max(faster.values()) - 1:.0%}: {', '.join(faster)}; "
            "their floors are set to their times. Other processes slowed the measurement of the ceilings, or caches "
            "held more than their size allows for: repeat the profile on an idle machine."
        )
    if profile["needs_gpu"]:
        lines.append(f"Only on a GPU: {'; '.join(profile['needs_gpu'])}.")
    if machine["gpu_problem"] and not profile["on_cpu"]:
        lines.append(f"No power, clocks and energy: {machine['gpu_problem']}.")
    if profile["not_batched_reason"]:
        lines.append(f"The views pass the networks one by one: {profile['not_batched_reason']}.")
    if profile["mode"] != "eager":
        lines.append(
            "The forward passes are compiled into one and are part of `rest`; phases were timed without a CUDA graph, "
            "the step with it."
        )
    if roofline is None:
        lines.append(f"No roofline: {profile['no_roofline']}.")
    elif roofline["unmodeled"]:
        lines.append(f"Roofline: {', '.join(roofline['unmodeled'])} counted by inputs and outputs alone.")
    return lines
