"""What a profile says, in words, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DATA_WAIT = 0.10
"""Share of a step spent waiting for images: less is the noise of a loader that keeps up."""
BATCH_GAIN = 1.4
"""An image in a batch twice as large takes less time by this factor: the step's fixed work weighs."""
BF16_GAIN = 1.15
"""Forward and backward are faster in bf16 by this factor."""
CORES_GAIN = 1.1
"""Forward and backward are faster on all cores by this factor."""
GPU_IDLE = 0.15
"""Share of the time in which no kernel runs."""
SIDE_WORK = 0.05
"""Share of a step for metrics or callbacks."""
OTHERS = 0.3
"""Cores that other processes keep busy; above, the figures of a CPU are not this run's alone."""
MEMORY_USED = 0.45
"""Of a GPU's memory: with less, twice the batch fits."""
POWER = 0.97
"""Of the power limit, while clocks are below this share of their maximum too."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that costs time, and what to do about it."""

    kind: str
    """`slow data`, `one thread`, `tiny batch`, `precision`, `host sync`, `host-bound`, ..."""
    share: float
    """Of the step's time that it costs, measured or estimated from measurements: the rank."""
    text: str
    """What was measured."""
    change: str
    """What to do."""


def findings(profile: dict[str, Any]) -> list[Finding]:
    """What there is to change, the costliest first.

    Args:
        profile: as `byol_fast.profiling.profile` returns it.
    """
    return sorted(_all(profile), key=lambda finding: -finding.share)


def _all(profile: dict[str, Any]) -> Iterator[Finding]:
    machine, probes, step = profile["machine"], profile["probes"], profile["step"]
    yield from _data(profile)

    threads, cores, more = machine["torch_threads"], machine["cores"], probes["all_cores"]
    busy = more is not None and more["others"] >= OTHERS
    if more is not None and (busy or more["gain"] >= CORES_GAIN):
        told = "how much all would bring cannot be measured while other processes keep them busy"
        share = 0.0 if busy else 1 - 1 / more["gain"]
        yield Finding(
            "one thread" if threads == 1 else "few threads",
            share,
            f"torch computes with {threads} of {cores} cores; "
            + (told if busy else f"on all of them forward and backward take {share:.0%} less time"),
            f"set OMP_NUM_THREADS={cores} (or leave it out), or call torch.set_num_threads({cores})",
        )

    gain = probes["twice_the_batch"]
    if gain is not None and gain >= BATCH_GAIN:
        batch = profile["batch_size"]
        yield Finding(
            "tiny batch",
            1 - 1 / gain,
            f"with batches of {2 * batch} instead of {batch} an image takes {1 - 1 / gain:.0%} less time: a step's "
            "fixed work outweighs its images",
            f"raise batch_size to {2 * batch} or more (the learning rate scales with it)",
        )

    gain = probes["bf16"]
    if gain is not None and gain >= BF16_GAIN:
        yield Finding(
            "precision",
            1 - 1 / gain,
            f"forward and backward take {1 - 1 / gain:.0%} less time in bf16 than in {profile['precision']} here",
            "set precision to bf16 (or auto)",
        )

    for sync in probes["host_syncs"]:
        where = "free on this CPU; a GPU's host" if profile["on_cpu"] else "the host"
        yield Finding(
            "host sync",
            0.02 if profile["on_cpu"] else profile["gpu"]["idle"],
            f"{sync['a_step']} times a step a value is fetched from the device at {sync['place']}: {where} waits for "
            "it, and launches nothing meanwhile",
            "keep the value a tensor (torch.where instead of if), or fetch it once every log_every steps",
        )

    for phase, change in (
        ("metrics", f"raise log_every (now {profile['config']['log_every']})"),
        ("callbacks", "do less in on_step_end, or do it every so many steps"),
    ):
        share = _share(profile, phase)
        if share >= SIDE_WORK:
            yield Finding(phase, share, f"{phase} take {share:.0%} of the step", change)

    if profile["gpu"] is not None:
        yield from _of_gpu(profile, step)


def _data(profile: dict[str, Any]) -> Iterator[Finding]:
    share = profile["step"]["data_wait"]
    if share < DATA_WAIT:
        return
    data, cores = profile["config"]["data"], profile["machine"]["cores"]
    threads = data["threads"] or cores
    if threads < cores:
        change = f"raise data.threads (now {threads} of {cores} cores)"
    elif profile["on_cpu"]:
        change = "the images are prepared on the cores that train: smaller images, or arrays (.npz), or more cores"
    else:
        change = (
            f"all {cores} cores prepare images already: more cores a GPU, data.loader dali, or device_cache for small "
            "data; smaller originals decode faster"
        )
    yield Finding(
        "slow data",
        share,
        f"data-bound: {share:.0%} of the step waits for images ({profile['backend']} loader, {threads} threads)",
        change,
    )


def _of_gpu(profile: dict[str, Any], step: dict[str, Any]) -> Iterator[Finding]:
    gpu, sampled = profile["gpu"], profile["machine"]["gpu"]
    waits = step["data_wait"] + _share(profile, "metrics") + _share(profile, "callbacks")
    host_bound = gpu["idle"] - waits
    if host_bound >= GPU_IDLE:
        change = "raise batch_size" if profile["mode"] == "graph" else "set mode to graph, or raise batch_size"
        yield Finding(
            "host-bound",
            host_bound,
            f"the GPU does nothing for {gpu['idle']:.0%} of the time, {host_bound:.0%} not for want of images: the "
            f"host is slow to launch its {gpu['launches']:.0f} kernels a step",
            change,
        )
    used = gpu["peak_bytes"] / gpu["memory_bytes"]
    if used < MEMORY_USED:
        yield Finding(
            "memory to spare",
            0.0,
            f"{used:.0%} of the GPU's memory is used",
            "a larger batch_size would fit" + ("; turn activation_checkpointing off" if gpu["checkpointing"] else ""),
        )
    if sampled is not None and sampled["power_w"] >= POWER * sampled["power_limit_w"]:
        slow = 1 - sampled["sm_clock_mhz"] / sampled["sm_clock_max_mhz"]
        if slow >= 1 - POWER:
            yield Finding(
                "power limit",
                slow,
                f"the GPU is at its power limit ({sampled['power_limit_w']:.0f} W), its clock {slow:.0%} too low",
                "raise the limit (nvidia-smi -pl), if you may, or compare with other runs at the same limit",
            )


def _share(profile: dict[str, Any], phase: str) -> float:
    return float(next((row["share"] for row in profile["phases"] if row["phase"] == phase), 0.0))


def notes(profile: dict[str, Any]) -> list[str]:
    """What one should know before believing the figures."""
    said = []
    machine = profile["machine"]
    if profile["on_cpu"] and machine["others"] >= OTHERS:
        said.append(
            f"Other processes kept {machine['others']:.1f} of {machine['cores']} cores busy: repeat this on a quiet "
            "machine."
        )
    if profile["on_cpu"] and profile["roofline"] is not None:
        said.append("A CPU's caches hold part of what the roofline counts as traffic: its floors are for memory alone.")
    if profile["needs_gpu"]:
        said.append(f"Not here, as they need a GPU: {'; '.join(profile['needs_gpu'])}.")
    if profile["machine"]["gpu_problem"] and not profile["on_cpu"]:
        said.append(f"No power, clocks and energy: {profile['machine']['gpu_problem']}.")
    if profile["views_note"]:
        said.append(f"The views pass the networks one by one: {profile['views_note']}.")
    if profile["mode"] != "eager":
        said.append(
            "The forward passes are compiled into one, and stand under `rest`; phases were timed without a CUDA graph, "
            "the step with it."
        )
    if profile["roofline"] is None:
        said.append(f"No roofline: {profile['no_roofline']}.")
    elif profile["roofline"]["unmodelled"]:
        said.append(f"Roofline: {', '.join(profile['roofline']['unmodelled'])} counted by inputs and outputs alone.")
    return said
