"""Execution mode of a step: eager, compiled by torch.compile, or compiled and captured in a CUDA graph."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from byol_fast.config import Config, ConfigError
from byol_fast.models.base import SSLModel
from byol_fast.training.train_step import Forward
from byol_fast.utils.precision import Precision


class Mode(NamedTuple):
    """Execution mode of a run's steps."""

    name: Literal["eager", "compile", "graph"]
    reason: str
    """Reason for the choice, for the startup summary."""


def resolve_mode(config: Config, device: torch.device, precision: Precision, world_size: int = 1) -> Mode:
    """`Config.mode` with "auto" resolved.

    Raises:
        ConfigError: the mode asked for is impossible for this run; names the reason.
    """
    against_graph = _against_graph(config, device, precision, world_size)
    against_compile = "activation checkpointing is not compiled" if config.activation_checkpointing else None
    mode = _choose(config, device, against_graph, against_compile)
    if config.max_autotune and mode.name == "eager":
        raise ConfigError(
            f"config: max_autotune must be off in mode 'eager' ({mode.reason}): nothing is compiled; set max_autotune "
            "to false, or mode to 'compile'"
        )
    return mode


def _choose(config: Config, device: torch.device, against_graph: str | None, against_compile: str | None) -> Mode:
    if config.mode == "graph" and against_graph:
        raise ConfigError(f"config: mode 'graph' cannot serve this run: {against_graph}; set mode to 'auto'")
    if config.mode == "compile" and against_compile:
        raise ConfigError(f"config: mode 'compile' cannot serve this run: {against_compile}; set mode to 'auto'")
    if config.mode != "auto":
        return Mode(config.mode, "as asked")
    if device.type == "cpu":
        return Mode("eager", "on CPUs compiling gains nothing and takes minutes")
    if against_compile:
        return Mode("eager", against_compile)
    if against_graph:
        return Mode("compile", f"no CUDA graph: {against_graph}")
    return Mode("graph", "one GPU, one process, one batch a step")


def _against_graph(config: Config, device: torch.device, precision: Precision, world_size: int) -> str | None:
    if device.type != "cuda":
        return "there is no GPU"
    if world_size > 1:
        return "there are several processes"
    if config.grad_accum_steps > 1:
        return "gradients of several batches are accumulated"
    if config.activation_checkpointing:
        return "activation checkpointing is not compiled"
    if precision.name == "fp16":
        return "fp16 with its loss scale has not been measured in a graph"
    return None


def compile_forward(model: SSLModel, mode: Mode, *, single_process: bool = True, max_autotune: bool = False) -> Forward:
    """`model.forward_train`, compiled at its first call unless the mode is eager.

    Args:
        model: the networks and the loss.
        mode: of the run.
        single_process: with several processes the networks are compiled one by one, because DDP wraps them.
        max_autotune: let inductor time several variants of each kernel, see `Config.max_autotune`.
    """
    if mode.name == "eager":
        return model.forward_train
    # Without inductor's own CUDA graphs: in mode graph ours goes around the whole step.
    tuning = "max-autotune-no-cudagraphs" if max_autotune else None
    if not single_process:
        for network in model.networks():
            network.compile(dynamic=False, mode=tuning)
        return model.forward_train
    # Batch and view size never change within a run, so there is nothing for dynamic shapes to save.
    forward: Forward = torch.compile(model.forward_train, dynamic=False, mode=tuning)
    return forward
