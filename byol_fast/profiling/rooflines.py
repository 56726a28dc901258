"""Roofline of a training step: its FLOPs and least memory traffic, and the ceilings of a device. Needs no GPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.config.fields import check
from byol_fast.models.base import NUM_GLOBAL_VIEWS, SSLModel
from byol_fast.models.builder import build_model
from byol_fast.models.byol import BYOL
from byol_fast.profiling.ceilings import Ceilings, Dtype
from byol_fast.profiling.layers import trace
from byol_fast.profiling.traffic import GRADIENT_WIDTH, LEVEL_NAMES, LEVELS, Kernel, Level, Traffic
from byol_fast.report.formatting import readable
from byol_fast.utils.output import PlainConsole

WIDTHS: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
"""Bytes per element of an activation."""
PHASES = ("online forward", "backward", "target forward", "loss", "optimizer + EMA")


class Totals(NamedTuple):
    """FLOPs and bytes of a step, or of a part of it."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """FLOPs and bytes of one family in one layer and phase."""

    layer: str
    phase: str
    family: str
    flops: dict[Level, int]
    """By level of fusion; levels without such a kernel are missing."""
    bytes: dict[Level, int]
    """By level of fusion, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """FLOPs and bytes of one training step at four levels of fusion."""

    encoder: str
    """Name of the encoder."""
    batch_size: int
    """Images per step."""
    view_sizes: tuple[int, ...]
    """Height and width in pixels of each view of an image: two global views, then the local ones."""
    dtype: Dtype
    """Precision of activations and products."""
    optimizer: str
    """`lars`, `sgd`, `adam` or `adamw`."""
    num_trainable: int
    """Number of parameters updated by the optimizer."""
    num_target: int
    """Number of parameters of the target."""
    unmodeled: tuple[str, ...]
    """Operations without a model, counted by their inputs and outputs alone."""
    kernels: dict[Level, list[Kernel]]
    """All kernels, by level of fusion."""

    @property
    def rows(self) -> list[Row]:
        """Sums over the kernels of each layer, phase and family, for all levels."""
        rows: dict[tuple[str, str, str], Row] = {}
        for level, kernels in self.kernels.items():
            for k in kernels:
                key = (k.layer, k.phase, k.family)
                row = rows.setdefault(key, Row(*key, {}, {}))
                row.flops[level] = row.flops.get(level, 0) + k.flops
                row.bytes[level] = row.bytes.get(level, 0) + k.bytes
        return list(rows.values())

    def total(self, level: Level, *, phase: str | None = None, family: str | None = None) -> Totals:
        """FLOPs and bytes of a step.

        Args:
            level: of fusion: `A` eager, `B` inductor, `D` batch norm fused into convolutions, `E` bound.
            phase: one of `PHASES`; None for all.
            family: of kernels, such as `"conv forward"`; None for all.
        """
        kernels = [k for k in self.kernels[level] if phase in {None, k.phase} and family in {None, k.family}]
        return Totals(sum(k.flops for k in kernels), sum(k.bytes for k in kernels))

    def floor(
        self, ceilings: Ceilings, level: Level, *, schedule: Literal["sum", "overlap"] = "sum", phase: str | None = None
    ) -> float:
        """Least seconds of a step.

        Args:
            ceilings: of the device.
            level: of fusion.
            schedule: `sum`: one kernel after the other, each `Ceilings.seconds`; `overlap`: memory and arithmetic are
                always busy, `max` of the totals.
            phase: one of `PHASES`; None for all.
        """
        check("roofline: schedule", Literal["sum", "overlap"], schedule)
        kernels = [k for k in self.kernels[level] if phase in {None, k.phase}]
        if schedule == "overlap":
            return max(
                sum(k.flops for k in kernels) / ceilings.flops_per_s,
                sum(ceilings.memory_seconds(k.bytes) for k in kernels),
            )
        return sum(ceilings.seconds(k.flops, k.bytes) for k in kernels)

    def images_per_second(
        self, ceilings: Ceilings, level: Level, *, schedule: Literal["sum", "overlap"] = "sum"
    ) -> float:
        """Maximum images per second: `batch_size / floor`."""
        return self.batch_size / self.floor(ceilings, level, schedule=schedule)

    def blocks(self, level: Level) -> dict[tuple[str, str], list[Kernel]]:
        """Kernels of each block and phase; a block is a layer's name cut to three parts (`encoder.layer1.0`)."""
        blocks: dict[tuple[str, str], list[Kernel]] = {}
        for k in self.kernels[level]:
            blocks.setdefault((".".join(k.layer.split(".")[:3]), k.phase), []).append(k)
        return blocks

    def to_json(self, ceilings: Sequence[Ceilings] = ()) -> dict[str, Any]:
        """Plain JSON values, with predictions for the given devices."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in {"kernels", "unmodeled"}
        }
        return values | {
            "unmodeled": list(self.unmodeled),
            "levels": {
                level: {"name": LEVEL_NAMES[level], **self.total(level)._asdict()}
                | {"phases": {phase: self.total(level, phase=phase)._asdict() for phase in PHASES}}
                for level in LEVELS
            },
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "predictions": [
                dataclasses.asdict(c)
                | {
                    "levels": {
                        level: {
                            "seconds": self.floor(c, level),
                            "seconds_overlap": self.floor(c, level, schedule="overlap"),
                            "images_per_second": self.images_per_second(c, level),
                        }
                        for level in LEVELS
                    }
                }
                for c in ceilings
            ],
        }

    def show(self, ceilings: Sequence[Ceilings]) -> None:
        """Print the traffic of a step and the maximum speed of the devices."""
        console = PlainConsole()
        views = " + ".join(f"{n} view{'s' * (n > 1)} of {size} px" for size, n in _consecutive(self.view_sizes))
        title = (
            f"{self.encoder}, {self.batch_size} images x {views}, {self.dtype}: "
            f"{readable(self.total('A').flops / 1e12, 4)} TFLOP per step"
        )
        table = Table(title=f"{title}\nleast memory traffic, GB per step", title_justify="left")
        table.add_column("phase")
        for level in LEVELS:
            table.add_column(f"{level} {LEVEL_NAMES[level]}", justify="right")
        for phase in PHASES:
            totals = [self.total(level, phase=phase) for level in LEVELS]
            if any(t.bytes for t in totals):
                table.add_row(phase, *(readable(t.bytes / 1e9, 4) for t in totals))
        table.add_section()
        table.add_row("all", *(readable(self.total(level).bytes / 1e9, 4) for level in LEVELS))
        console.print(table)

        table = Table(title="maximum images per second (milliseconds per step)", title_justify="left")
        table.add_column("device")
        table.add_column("TB/s", justify="right")
        table.add_column("TFLOP/s", justify="right")
        for level in LEVELS:
            table.add_column(level, justify="right")
        for c in ceilings:
            floors = [self.floor(c, level) for level in LEVELS]
            table.add_row(
                c.name,
                readable(c.bytes_per_s / 1e12),
                readable(c.flops_per_s / 1e12),
                *(f"{self.batch_size / s:,.0f} ({readable(1e3 * s, 4)})" for s in floors),
            )
        console.print(table)
        for source in dict.fromkeys(c.source for c in ceilings):
            names = ", ".join(c.name for c in ceilings if c.source == source)
            console.print(f"ceilings of {names}: {source}", soft_wrap=True)
        if self.unmodeled:
            console.print(f"counted by their inputs and outputs alone: {', '.join(self.unmodeled)}", soft_wrap=True)

    def points(self, ceilings: Ceilings, level: Level) -> dict[str, tuple[list[float], list[float]]]:
        """FLOP per byte and maximum TFLOP/s of each block of layers, by phase.

        Blocks with norms lie below the roof, because norms take time and count no FLOPs.
        """
        points: dict[str, tuple[list[float], list[float]]] = {}
        for (_, phase), kernels in self.blocks(level).items():
            flops, num_bytes = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
            if flops:
                seconds = sum(ceilings.seconds(k.flops, k.bytes) for k in kernels)
                x, y = points.setdefault(phase, ([], []))
                x.append(flops / num_bytes)
                y.append(flops / seconds / 1e12)
        return points

    def chart(self, ceilings: Ceilings, level: Level) -> str:
        """Roofline chart as SVG, see `points`.

        Args:
            ceilings: of the device.
            level: of fusion.
        """
        from byol_fast.profiling.page import roofline_chart

        return roofline_chart(
            self.points(ceilings, level),
            dataclasses.asdict(ceilings),
            title=f"{self.encoder} on {ceilings.name}: {LEVEL_NAMES[level]}",
        )


def roofline(
    encoder: str | nn.Module | Config,
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    dtype: Dtype = "bf16",
) -> Roofline:
    """FLOPs and least bytes of a BYOL or SimSiam step with any encoder, from meta tensors.

    Args:
        encoder: name or module as in `BYOL` (heads of the reference, LARS), or the configuration of a run.
        batch_size: images per step; by default the configuration's, or 256.
        image_size: height and width of the global views in pixels; by default the configuration's, or 224. Local views
            are the configuration's.
        dtype: precision of activations and products.

    Raises:
        ValueError: the encoder is unknown, rejects such images, or cannot run on meta tensors.

    Examples:
        >>> r = roofline("resnet50", batch_size=256, image_size=224)
        >>> r.total("B").bytes, r.images_per_second(stated("H100"), "B")
    """
    if dtype not in WIDTHS:
        raise ValueError(f"roofline: dtype must be one of {', '.join(WIDTHS)}, got {dtype!r}")
    config = _config(encoder, batch_size, image_size)
    with torch.device("meta"):
        model = _build_model(encoder, config)
    width, view_sizes = WIDTHS[dtype], tuple(view.size for view in config.view_configs)

    # --- the passes of each network, consecutive views of one size in one batch
    graphs, passes = [], []
    for network in model.networks():
        is_online = network is model.online
        for size, num_views in _consecutive(view_sizes if is_online else view_sizes[:NUM_GLOBAL_VIEWS]):
            images = torch.empty(config.batch_size * num_views, 3, size, size, device="meta")
            graphs.append(trace(network, [images]))
            phase = "online forward" if is_online else "target forward"
            passes.append(Traffic(graphs[-1], width=width, phase=phase, backward=is_online))

    # --- the kernels of a step at each level
    num_trainable = sum(p.numel() for p in model.trainable_parameters() if p.requires_grad)
    num_target = sum(p.numel() for p in model.target_parameters())
    kernels: dict[Level, list[Kernel]] = {}
    for level in LEVELS:
        one_batch = [kernel for traffic in passes for kernel in traffic.kernels(level)]
        one_batch += _loss(config.batch_size, config.num_local_views, config.model.projection_dim, width, level)
        update = _update(config.optim.name, num_trainable, num_target, width, level)
        kernels[level] = [*(config.grad_accum_steps * one_batch), update]
    return Roofline(
        encoder=type(encoder).__name__ if isinstance(encoder, nn.Module) else config.model.encoder,
        batch_size=config.batch_size * config.grad_accum_steps,
        view_sizes=view_sizes,
        dtype=dtype,
        optimizer=config.optim.name,
        num_trainable=num_trainable,
        num_target=num_target,
        unmodeled=tuple(sorted({op for graph in graphs for op in graph.unmodeled()})),
        kernels=kernels,
    )


def _consecutive(view_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Size and number of consecutive views of one size."""
    return [(size, len(list(group))) for size, group in itertools.groupby(view_sizes)]


def _config(encoder: str | nn.Module | Config, batch_size: int | None, image_size: int | None) -> Config:
    config = encoder if isinstance(encoder, Config) else Config()
    changes: dict[str, object] = {"model.view_batching": "separate"}
    if isinstance(encoder, str):
        changes["model.encoder"] = encoder
    if image_size is not None:
        changes |= {"view1.size": image_size, "view2.size": image_size}
    if batch_size is not None:
        changes["batch_size"] = batch_size
    return configs.replace(config, changes)


def _build_model(encoder: str | nn.Module | Config, config: Config) -> SSLModel:
    if isinstance(encoder, nn.Module):
        return BYOL(copy.deepcopy(encoder).to("meta"), image_size=config.view1.size, view_batching="separate")
    return build_model(config)


class _EagerLoss(nn.Module):
    """BYOL's loss in separate operators, as levels A and B run it."""

    def forward(self, p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor, *p_local: Tensor) -> Tensor:
        pairs = [(p1, z2), (p2, z1), *((p, z) for p in p_local for z in (z1, z2))]
        hat = {x: F.normalize(x, dim=1) for x in (p1, z2, p2, z1, *p_local)}
        return sum((2 - 2 * (hat[p] * hat[z]).sum(1)).mean() for p, z in pairs)  # type: ignore[return-value]


def _loss(num_rows: int, num_local: int, size: int, width: int, level: Level) -> list[Kernel]:
    """All pairs of the loss; the fused kernel reads predictions and targets and writes gradients of predictions."""
    if level in {"D", "E"}:
        return [Kernel("", "loss", "loss", 0, (6 + 2 * num_local) * num_rows * size * width)]
    has_grad = (True, False, True, False, *[True] * num_local)
    inputs = [torch.empty(num_rows, size, device="meta", requires_grad=grad) for grad in has_grad]
    traffic = Traffic(trace(_EagerLoss(), inputs), width=width, phase="loss", backward=True)
    return [Kernel("", "loss", "loss", k.flops, k.bytes) for k in traffic.kernels(level)]


# Bytes per parameter, fp32: reads of p, g and the state, writes of p and the state.
_OPTIMIZERS = {"lars": 20, "sgd": 20, "adam": 28, "adamw": 28}


def _update(optimizer: str, num_trainable: int, num_target: int, width: int, level: Level) -> Kernel:
    """Optimizer and EMA, one after the other or (D, E) in one pass that also writes low-precision weights.

    LARS reads p and g once more for their norms; at E they are still in a cache. The EMA reads both networks and writes
    one; as a separate pass it also reads the weights just written by the optimizer. Weights are cast to the products'
    precision in each step (read 4, write `width`) unless the pass writes them.
    """
    norms = 8 if optimizer == "lars" and level != "E" else 0
    low = width if width < GRADIENT_WIDTH else 0
    if level in {"A", "B"}:
        cast = 4 + low if low else 0
        num_bytes = num_trainable * (_OPTIMIZERS[optimizer] + norms + cast) + num_target * (12 + cast)
    else:
        num_bytes = num_trainable * (_OPTIMIZERS[optimizer] + norms + low) + num_target * (8 + low)
    return Kernel("", "optimizer + EMA", "optimizer + EMA", 0, num_bytes)
