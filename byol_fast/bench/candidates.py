"""Candidates of the step comparisons: the baseline, byol_fast and other libraries, all on the same problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from byol_fast.bench.baseline import BaselineStep
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.flags import BackendFlags
from byol_fast.bench.library_steps import BYOLPyTorchStep, LightlyStep, StablePretrainingStep
from byol_fast.bench.problem import Problem
from byol_fast.bench.processes import Job
from byol_fast.utils import env

STEPS: dict[str, Callable[..., Any]] = {
    "baseline": BaselineStep,
    "byol_fast": ByolFastStep,
    "lightly": LightlyStep,
    "byol-pytorch": BYOLPyTorchStep,
    "stable-pretraining": StablePretrainingStep,
}

SEPARATE = "four passes, one view each"
BATCHED = "two passes, both views in each, batch-norm statistics per view"
BASELINE = "baseline: fp32, NCHW"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to take a training step, and its differences from the others."""

    step: str
    """Key of `STEPS`."""
    note: str
    options: dict[str, Any]
    requires: str = ""
    """Distribution that must be installed."""

    @property
    def version(self) -> str:
        """Installed version of that distribution; empty if it is missing or none is required."""
        return (env.version(self.requires) or "") if self.requires else ""

    @property
    def is_installed(self) -> bool:
        """True if the required distribution is installed."""
        return bool(self.version or not self.requires)

    def job(self, problem: Problem) -> Job:
        """The candidate as an argument for another process."""
        arguments = {"step": self.step, "problem": problem, "options": self.options}
        return Job(factory=f"{__name__}:build_step", arguments=arguments)


def build_step(step: str, problem: Problem, options: dict[str, Any]) -> Any:
    """Build the step of a candidate under the process-wide flags of its precision.

    Nothing else in a comparison sets flags, so they are equal for all candidates of a precision.

    Args:
        step: key of `STEPS`.
        problem: networks, batch and device.
        options: of the step.
    """
    precision = options.get("precision", "fp32")
    BackendFlags.of(precision, cudnn_benchmark=problem.cudnn_benchmark).apply()
    return STEPS[step](problem, **options)


def baseline(note: str = "as the baseline", **options: Any) -> Candidate:
    """The baseline with options."""
    return Candidate(step="baseline", note=note, options=options)


def byol_fast(note: str, **options: Any) -> Candidate:
    """The step of byol_fast with options."""
    return Candidate(step="byol_fast", note=note, options=options)


def library_candidates(device: torch.device, precision: str = "fp32") -> dict[str, Candidate]:
    """The baseline, other libraries and byol_fast, on a device.

    Args:
        device: of the steps.
        precision: of the baseline and byol_fast, in addition to fp32.
    """
    mode = "graph" if device.type == "cuda" else "eager"
    graph = "one CUDA graph; " if mode == "graph" else ""
    low_baseline, low_byol_fast = {}, {}
    if precision != "fp32":
        note, cast = "as the baseline, autocast", "as byol_fast, fp32; autocast, weights cast by the optimizer"
        low_baseline[f"baseline, NHWC, {precision}"] = baseline(note, channels_last=True, precision=precision)
        low_byol_fast[f"byol_fast, {precision}"] = byol_fast(cast, precision=precision, mode=mode)
    return {
        BASELINE: baseline(f"{SEPARATE}; loss by F.normalize; SGD; EMA in a loop at the end"),
        "baseline with Adam": baseline("as the baseline; Adam", optimizer="adam"),
        **low_baseline,
        "lightly": Candidate(
            step="lightly",
            note=f"{SEPARATE}; fp32; loss times 1/4 minus 1, by cosine_similarity; its LARS, which decays and adapts "
            "biases and norms too; foreach EMA at the beginning; frozen parameters, outputs detached",
            options={},
            requires="lightly",
        ),
        "byol-pytorch": Candidate(
            step="byol-pytorch",
            note="two passes, both views in each, batch norm mixes them: another function; fp32; it has no optimizer: "
            "the baseline's SGD; EMA in a loop at the end; its simplicial embeddings off",
            options={},
            requires="byol-pytorch",
        ),
        "stable-pretraining": Candidate(
            step="stable-pretraining",
            note=f"{SEPARATE}; fp32; loss times 1/2; its LARS; EMA of parameters and buffers in a loop at the end; "
            "without its Lightning trainer",
            options={},
            requires="stable-pretraining",
        ),
        "byol_fast, fp32": byol_fast(
            f"{graph}{BATCHED}; NHWC; LARS and EMA in one pass; skips non-finite steps", mode=mode
        ),
        **low_byol_fast,
    }


def ablation_candidates(device: torch.device, precision: str, modes: tuple[str, ...]) -> dict[str, Candidate]:
    """From the baseline to byol_fast, one change at a time.

    Args:
        device: of the steps.
        precision: of the last steps.
        modes: of execution, of the last steps.
    """
    candidates = {
        BASELINE: baseline(f"{SEPARATE}; loss by F.normalize; SGD; EMA in a loop at the end"),
        "baseline, NHWC": baseline(channels_last=True),
    }
    if precision != "fp32":
        candidates[f"baseline, NHWC, {precision}"] = baseline("autocast", channels_last=True, precision=precision)
    if device.type == "cpu":
        plain: dict[str, Any] = {"batched": False, "memory": False, "small_maps": False}
        candidates |= {
            "byol_fast, fp32, views separate": byol_fast("NHWC; LARS and EMA in one pass", **plain),
            "byol_fast, fp32, + views batched": byol_fast(BATCHED, memory=False, small_maps=False),
            "byol_fast, fp32, + freed memory kept": byol_fast("keep_freed_memory", small_maps=False),
            "byol_fast, fp32, + small maps": byol_fast("use_small_map_convolutions"),
        }
        if precision != "fp32":
            name = f"byol_fast, {precision}, none of the last three"
            candidates[name] = byol_fast("views separate", precision=precision, **plain)
    else:
        candidates["byol_fast, fp32, eager, views separate"] = byol_fast(
            "NHWC; LARS and EMA in one pass", batched=False
        )
        candidates["byol_fast, fp32, eager"] = byol_fast(BATCHED)
    for mode in modes:
        candidates[f"byol_fast, {precision}, {mode}"] = byol_fast(f"mode {mode}", precision=precision, mode=mode)
    return candidates
