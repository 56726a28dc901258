"""What a GPU was meant to reach beside what it did: the Markdown table of `benchmarks.gpu_bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from byol_fast.bench.results import Contender, SuiteResult, load

Value = Callable[["Measured"], float]


class MissingError(Exception):
    """A figure that was not measured, and which one."""


class Measured:
    """The results of a folder.

    Args:
        folder: of `benchmarks.gpu_bench`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def suite(self, file: str, name: str) -> SuiteResult:
        """A suite whose name begins so."""
        path = self.folder / f"{file}.json"
        if not path.exists():
            raise MissingError(f"{file} has no results")
        for suite in load(path)[1]:
            if suite.name.startswith(name):
                return suite
        raise MissingError(f"{file} has no suite {name!r}")

    def contender(self, file: str, suite: str, name: str) -> Contender:
        """A contender of it."""
        for contender in self.suite(file, suite).contenders:
            if contender.name == name:
                return contender
        raise MissingError(f"{name!r} was not measured")

    def seconds(self, file: str, suite: str, name: str) -> float:
        """Of a call, median."""
        return self.contender(file, suite, name).timing.median

    def faster(self, file: str, suite: str, ours: str, theirs: str) -> float:
        """How many times as fast ours is."""
        return self.seconds(file, suite, theirs) / self.seconds(file, suite, ours)

    def rate(self, file: str, suite: str, name: str) -> float:
        """Images a second."""
        amount = self.suite(file, suite).amount
        if amount is None:
            raise MissingError(f"{suite!r} counts no images")
        return amount / self.seconds(file, suite, name)

    def milliseconds_for(self, images: int, suite: str, name: str) -> float:
        """Of a kernel on that many images."""
        return 1e3 * images / self.rate("kernels", suite, name)

    def json(self, file: str) -> dict[str, Any]:
        """A part's own file."""
        path = self.folder / f"{file}.json"
        if not path.exists():
            raise MissingError(f"{file} has no results")
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def floor(self, level: str) -> float:
        """Images a second of ResNet-50 at most, by the ceilings that were measured here."""
        from byol_fast import recipes
        from byol_fast.profiling import Ceilings, roofline

        found = [Ceilings(**c) for c in self.json("ceilings")["ceilings"] if c["dtype"] == "bf16"]
        return roofline(recipes.imagenet_resnet50(), dtype="bf16").images_per_s(found[0], level)  # type: ignore[arg-type]


class Target(NamedTuple):
    """What was aimed at."""

    what: str
    value: Value
    unit: str
    least: float | None = None
    most: float | None = None


def _faster(what: str, least: float, suite: str, ours: str, theirs: str) -> Target:
    return Target(what, lambda m: m.faster("kernels", suite, ours, theirs), "x", least)


EMA, LARS = "ours: ema_update_", "ours: LARS.step(ema=..., copies=...), bfloat16"
LOSS = "loss forward + backward, 256 x 256 bfloat16"
STEP, GRAPH = "a step", "ours, bf16, graph"
TARGETS = [
    Target(
        "average: share of a copy's bandwidth (captured)",
        lambda m: m.contender("kernels", "EMA", f"{EMA}, captured").extras["share_of_copy"],
        "",
        0.92,
    ),
    _faster("average over foreach mul + add (captured)", 1.6, "EMA", f"{EMA}, captured", "foreach mul+add, captured"),
    _faster(
        "average over _foreach_lerp_ (captured)", 1.05, "EMA", f"{EMA}, captured", "torch._foreach_lerp_, captured"
    ),
    _faster("LARS + average + bf16 copies over lightly's", 20, "LARS + EMA", LARS, "lightly: LARS, update_momentum"),
    Target(
        "LARS + average + bf16 copies (captured)",
        lambda m: 1e3 * m.seconds("kernels", "LARS + EMA", f"{LARS}, captured"),
        "ms",
        most=0.6,
    ),
    _faster("loss, 256 rows, bf16, over the textbook's", 15, LOSS, "ours: byol_loss", "textbook"),
    _faster("the same, both captured", 1.0, LOSS, "ours: byol_loss, captured", "textbook, captured"),
    _faster("loss over the compiled textbook's", 1.2, LOSS, "ours: byol_loss", "textbook, torch.compile"),
    _faster("the same, both captured", 1.2, LOSS, "ours: byol_loss, captured", "textbook, torch.compile, captured"),
    Target(
        "colour to bf16, 512 images of 224 px (captured)",
        lambda m: m.milliseconds_for(512, "flip, colour", "ours: photometric, captured"),
        "ms",
        most=0.2,
    ),
    Target(
        "blur of radius 11, 512 images of 224 px (captured)",
        lambda m: m.milliseconds_for(512, "blur", "ours: gaussian_blur, window of 23, captured"),
        "ms",
        most=0.35,
    ),
    Target("ResNet-50 step, 224 px, bf16, graph", lambda m: m.rate("resnet50", STEP, GRAPH), "images/s", 2300),
    Target(
        "the same: share of the floor of inductor's fusions",
        lambda m: m.rate("resnet50", STEP, GRAPH) / m.floor("B"),
        "",
        0.8,
    ),
    Target(
        "ResNet-50 over the compiled textbook, NHWC, bf16",
        lambda m: m.faster("resnet50", STEP, GRAPH, "textbook, NHWC, bf16, torch.compile"),
        "x",
        1.15,
    ),
    Target("ResNet-50 over lightly's loop", lambda m: m.faster("resnet50", STEP, GRAPH, "lightly"), "x", 1.0),
    Target("ResNet-18, 32 px, over lightly's loop", lambda m: m.faster("resnet18", STEP, GRAPH, "lightly"), "x", 1.0),
    Target(
        "two 224 px views from JPEG keep up with the step",
        lambda m: (
            max(
                m.rate("data", "two 224 px", c.name)
                for c in m.suite("data", "two 224 px").contenders
                if c.name.startswith("ours")
            )
            / m.rate("resnet50", STEP, GRAPH)
        ),
        "x",
        1.0,
    ),
    Target(
        "ResNet-50 from JPEG: share of the step on ready views",
        lambda m: m.rate("end-to-end", "from images", "ours, bf16") / m.rate("resnet50", STEP, GRAPH),
        "",
        0.95,
    ),
]


def summary(folder: Path, *, rehearsal: bool) -> str:
    """Target, measured and verdict, of what lies in a folder.

    Args:
        folder: of results.
        rehearsal: whether they were made on a CPU with tiny sizes.
    """
    measured = Measured(folder)
    lines = ["# A rehearsal: no figure means anything\n"] if rehearsal else []
    lines += [_machine(measured)] if not rehearsal else []
    lines += ["| what | target | measured | |", "|---|---:|---:|---|"]
    for target in TARGETS:
        aim = f">= {target.least:g}" if target.least is not None else f"<= {target.most:g}"
        try:
            value = target.value(measured)
        except MissingError as missing:
            lines.append(f"| {target.what} | {aim} {target.unit} | not measured | {missing} |")
            continue
        met = value >= target.least if target.least is not None else target.most is not None and value <= target.most
        lines.append(
            f"| {target.what} | {aim} {target.unit} | {value:.4g} {target.unit} | {'met' if met else 'MISSED'} |"
        )
    return "\n".join([*lines, *_steps(measured), *_inductor(measured)]) + "\n"


def _machine(measured: Measured) -> str:
    try:
        record = measured.json("ceilings")
    except MissingError:
        return ""
    about, best = record["environment"], record["ceilings"][0]
    return (
        f"{about.get('gpu')}, {about['date']}, commit {about.get('commit')}: copies "
        f"{best['bytes_per_s'] / 1e12:.2f} TB/s, bf16 products {best['flops_per_s'] / 1e12:.0f} TFLOP/s\n"
    )


def _steps(measured: Measured) -> list[str]:
    lines: list[str] = []
    for file in ("resnet50", "resnet18"):
        try:
            suite = measured.suite(file, STEP)
        except MissingError:
            continue
        lines += ["", f"| {suite.name} | {suite.unit} | peak GiB |", "|---|---:|---:|"]
        for contender in suite.contenders:
            peak = contender.extras.get("peak_gib", float("nan"))
            lines.append(f"| {contender.name} | {suite.shown(contender.timing)[1]:,.0f} | {peak:.1f} |")
    return lines


def _inductor(measured: Measured) -> list[str]:
    try:
        found = measured.json("inductor")
    except MissingError:
        return []
    lines = ["", "ResNet-50 as inductor has it (max-autotune):", *(f"- {answer}" for answer in found["answers"])]
    lines += [f"- ncu: {found['ncu'] or 'not run'}"]
    if found["memory_by_family"]:
        lines += ["", "| kernels | launches | GB | ms |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['family']} | {row['launches']} | {row['gb']:.2f} | {row['ms']:.2f} |"
            for row in found["memory_by_family"]
        ]
    return lines
