"""Item: DALI: views compared with torchvision's, decoding under load, images per second, and from JPEG to weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import Checks, byol_fast_step, free, is_small, link_copies, resnet50, set_flags
from benchmarks.gpu.items.timing import figures, rounded
from byol_fast import config as configs
from byol_fast.bench.synthetic_jpegs import write_synthetic_jpegs
from byol_fast.bench.timing import Timing
from byol_fast.config import Config, recipes
from byol_fast.data import ImageSource, ViewLoader, make_loader, open_source
from byol_fast.report import view_check
from byol_fast.training.metrics import ThroughputMeter

BATCH = 256
"""As in the item of the compiled step, so that its code is cached."""
LOADERS: dict[str, dict[str, Any]] = {
    "dali, kernels": {"loader": "dali", "augment": "kernels"},
    "dali, its operators": {"loader": "dali", "augment": "dali"},
    "threaded, kernels": {"loader": "threaded", "augment": "kernels"},
}
ROUNDS = 5
PARITY_SIZE = 96
"""Size of the compared views in pixels: torchvision makes them on the CPU, one at a time."""
COMPILATION = 60.0


def run(context: Context) -> str | None:
    """Run all four parts on synthetic JPEGs."""
    small, checks = is_small(context), Checks(context)
    with tempfile.TemporaryDirectory() as folder:
        images = write_synthetic_jpegs(Path(folder), 8 if small else 64)
        compare(context, checks, open_source(images), num_images=4 if small else view_check.NUM_IMAGES)
        link_copies(context, images)
        source = open_source(images)
        under_load(context, checks, source)
        for name, data in LOADERS.items():
            throughput(context, name, source, data)
        if context.seconds_left() < COMPILATION and not small:
            return "no time was left to compile the step of end to end"
        end_to_end(context, source)
    return checks.problem()


def _config(context: Context, batch: int, data: dict[str, Any]) -> Config:
    changes: dict[str, Any] = {"batch_size": 4 if is_small(context) else batch, "data": data}
    if is_small(context):
        changes |= {"view1.size": 32, "view2.size": 32}
    return configs.replace(recipes.imagenet_resnet50(), changes)


def compare(context: Context, checks: Checks, source: ImageSource, *, num_images: int) -> None:
    """Compare operators and views of all loaders with torchvision's."""
    rows = []
    for loader, data in LOADERS.items():
        config = _config(context, BATCH, data)
        if not is_small(context):
            config = configs.replace(config, {"view1.size": PARITY_SIZE, "view2.size": PARITY_SIZE})
        results = view_check.compare(source, config, torch.device(context.device), num_images=num_images)
        rows += [result._replace(name=f"{result.name}, {loader}") for result in results]
    lines = [f"{row.name:36s} {row.largest:.3g} / {row.mean:.3g} at most {row.bound:.3g}" for row in rows]
    (context.folder / "parity.txt").write_text("\n".join(lines) + "\n")
    failed = [row for row in rows if not row.ok]
    checks("parity: rows beyond their limit", len(failed), 0, rows=len(rows))
    for row in failed:
        values = {name: rounded(value) for name, value in row._asdict().items() if isinstance(value, float)}
        context.record(f"parity: {row.name}", **values, num_wrong=row.num_wrong)


# ------------------------------------------------------------------------------------------------ under load


def under_load(context: Context, checks: Checks, source: ImageSource) -> None:
    """Views made while the device is busy equal those of an idle device, bit for bit."""
    for name, data in LOADERS.items():
        config = _config(context, 64, data)
        idle = _views(context, source, config)
        with _busy(context):
            loaded = _views(context, source, config)
        different = sum(not torch.equal(a, b) for a, b in zip(idle, loaded, strict=True))
        checks(f"under load: {name}, views that differ of {len(idle)}", different, 0)


def _views(context: Context, source: ImageSource, config: Config) -> list[Tensor]:
    loader = make_loader(source, config, device=torch.device(context.device))
    batches = [next(loader) for _ in range(2 if is_small(context) else 8)]
    views = [view.cpu() for batch in batches for view in (batch.views[0], batch.views[1])]
    loader.close()
    return views


@contextmanager
def _busy(context: Context) -> Iterator[None]:
    """Keep arithmetic units and memory busy, on another stream and on the current one."""
    if context.device != "cuda":
        yield
        return
    a, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    other.wait_stream(torch.cuda.current_stream())
    for stream in (other, torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            for _ in range(100):
                a = a @ a.clamp(-1, 1)
    yield
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ speed


def _rounds(context: Context, loader: ViewLoader, work: Any, batches: int) -> tuple[Timing, float]:
    """Seconds per batch, round by round, and the share of the time spent waiting for the next batch."""
    meter, waited_before, seconds = ThroughputMeter(), 0.0, []
    for number in range(1 + (1 if is_small(context) else ROUNDS)):
        start = time.perf_counter()
        for _ in range(batches):
            with meter.data_wait(loader):
                batch = next(loader)
            work(batch)
        if context.device == "cuda":
            torch.cuda.synchronize()
        if number:
            seconds.append((time.perf_counter() - start) / batches)
        else:  # the first round warms up
            waited_before = meter.data_wait_seconds
    return Timing(tuple(seconds)), (meter.data_wait_seconds - waited_before) / (sum(seconds) * batches)


def _record(context: Context, name: str, config: Config, timing: Timing, **values: Any) -> None:
    context.record(name, **figures(timing, images=config.batch_size), batch=config.batch_size, **values)


def throughput(context: Context, name: str, source: ImageSource, data: dict[str, Any]) -> None:
    """Two 224 px views from JPEG by one loader, without a training step.

    Args:
        context: of the item.
        name: of the loader.
        source: of the images.
        data: options of the loader.
    """
    config = _config(context, BATCH, data)
    loader = make_loader(source, config, device=torch.device(context.device))
    timing, _ = _rounds(context, loader, lambda batch: None, 1 if is_small(context) else 4)
    loader.close()
    _record(context, f"views from JPEG: {name}", config, timing)


def end_to_end(context: Context, source: ImageSource) -> None:
    """From JPEG to trained weights: DALI and the captured step."""
    free(context)
    config = _config(context, BATCH, LOADERS["dali, kernels"])
    step = byol_fast_step(context, resnet50(context, BATCH), "graph")
    flags = set_flags()
    loader = make_loader(source, config, device=torch.device(context.device))
    step.step(next(loader), 0)
    timing, waited = _rounds(context, loader, lambda batch: step.step(batch, 0), 1 if is_small(context) else 8)
    loader.close()
    _record(context, "from JPEG to trained weights: byol_fast", config, timing, data_wait=rounded(waited), **flags)
