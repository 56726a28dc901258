"""From encoded images to trained weights: the loop of byol_fast and the usual loops around a `DataLoader`.

Every candidate reads the same images, makes two views of each and takes training steps. On a CPU all its work is done
in its process, with one thread, and CPU time is measured; on a GPU the loaders have a process or thread per core, and
wall-clock time is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from byol_fast.bench.candidates import build_step
from byol_fast.bench.data import PILBlur, torchvision_transform, wait_for_background_threads
from byol_fast.bench.problem import Problem
from byol_fast.bench.processes import Job
from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data import ImageSource, ViewLoader, make_loader, open_source
from byol_fast.training.metrics import ThroughputMeter
from byol_fast.utils.env import num_cpus

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class TwoViewDataset(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image.

    Args:
        source: of PIL images.
        transforms: of the two views.
    """

    def __init__(self, source: ImageSource, transforms: list[Callable[..., Tensor]]) -> None:
        self.source, self.transforms = source, transforms

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.source.load(index)
        view1, view2 = (transform(image) for transform in self.transforms)
        return view1, view2


class Loop:
    """A data loader and a training step, some steps per call.

    Args:
        batches: endless iterator over batches.
        step: training step on a batch.
        steps: per call.
        device: of the step.
        has_threads: the loader prepares batches in threads of this process, whose CPU time counts.
        loader: of byol_fast, if the batches are its own.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        step: Callable[[Any], object],
        steps: int,
        device: torch.device,
        *,
        has_threads: bool = False,
        loader: ViewLoader | None = None,
    ) -> None:
        self.batches, self.step, self.steps, self.device, self.has_threads = batches, step, steps, device, has_threads
        self.loader, self.meter, self.total_seconds = loader, ThroughputMeter(), 0.0

    def __call__(self) -> None:
        """Take the steps of a call."""
        start = time.perf_counter()
        for _ in range(self.steps):
            with self.meter.data_wait(self.loader):
                batch = next(self.batches)
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.has_threads:
            wait_for_background_threads()  # the batches prepared ahead count, too
        self.total_seconds += time.perf_counter() - start

    @property
    def extras(self) -> dict[str, float]:
        """Share of the time spent waiting for data."""
        return {"data_wait": self.meter.data_wait_seconds / self.total_seconds}


def view_configs(problem: Problem) -> tuple[ViewConfig, ViewConfig]:
    """The paper's two views at the size of a problem."""
    return ViewConfig(size=problem.image_size), ViewConfig(size=problem.image_size, blur_p=0.1, solarize_p=0.2)


def byol_fast_loop(problem: Problem, images: str, steps: int, precision: str, mode: str) -> Loop:
    """Loader and step of byol_fast.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: per call.
        precision: of the step.
        mode: of the step.
    """
    device = torch.device(problem.device)
    view1, view2 = view_configs(problem)
    data = DataConfig(threads=1 if device.type == "cpu" else 0)
    config = Config(batch_size=problem.batch_size, data=data, view1=view1, view2=view2)
    loader = make_loader(open_source(Path(images)), config, device=device)
    step = build_step("byol_fast", problem, {"precision": precision, "mode": mode})
    return Loop(iter(loader), lambda batch: step.step(batch, 0), steps, device, has_threads=True, loader=loader)


def dataloader_loop(problem: Problem, images: str, steps: int, precision: str, kind: str) -> Loop:
    """Transforms of PIL images in a `DataLoader`, and the step of the baseline or of lightly.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: per call.
        precision: of the baseline's step.
        kind: "baseline" or "lightly".
    """
    device = torch.device(problem.device)
    views, source = view_configs(problem), open_source(Path(images))
    transforms: list[Callable[..., Tensor]]
    if kind == "lightly":
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        pair = (BYOLView1Transform(input_size=views[0].size), BYOLView2Transform(input_size=views[1].size))
        transforms = list(BYOLTransform(*pair).transforms)
        step = build_step("lightly", problem, {})
    else:
        last = [v1.ToTensor(), v1.Normalize(MEAN, STD)]
        blur = PILBlur(views[0].blur_sigma)
        transforms = [torchvision_transform(v1, view, blur, last) for view in views]
        options = {"precision": precision, "channels_last": precision != "fp32"}
        step = build_step("baseline", problem, options)
    workers = 0 if device.type == "cpu" else num_cpus()
    loader = DataLoader(
        TwoViewDataset(source, transforms),
        problem.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    if not len(loader):
        raise ValueError(
            f"bench: {images} must hold at least a batch of {problem.batch_size} images, got {len(source)}; lower "
            "--batch-size"
        )

    def train_on(batch: tuple[Tensor, Tensor]) -> None:
        step.views = [view.to(device, non_blocking=True) for view in batch]
        step()

    return Loop(_endless(loader), train_on, steps, device)


def _endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[Any]:
    while True:
        yield from loader


def build_jobs(
    problem: Problem, images: Path, *, steps: int, precision: str, mode: str, lightly: bool
) -> dict[str, Job]:
    """Loops by name; the first is the baseline's.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: per call.
        precision: of byol_fast, and of the faster baseline.
        mode: of byol_fast.
        lightly: include lightly, which must be installed.
    """
    common = {"problem": problem, "images": str(images), "steps": steps}

    def dataloader_job(kind: str, precision: str) -> Job:
        arguments = {**common, "kind": kind, "precision": precision}
        return Job(factory=f"{__name__}:dataloader_loop", arguments=arguments)

    jobs = {"baseline: PIL transforms, DataLoader, fp32": dataloader_job("baseline", "fp32")}
    if precision != "fp32":
        jobs[f"baseline: the same, NHWC, {precision}"] = dataloader_job("baseline", precision)
    if lightly:
        jobs["lightly: BYOLTransform, DataLoader, fp32"] = dataloader_job("lightly", "fp32")
    for name in dict.fromkeys(("fp32", precision)):
        arguments = {**common, "precision": name, "mode": mode}
        jobs[f"byol_fast, {name}"] = Job(factory=f"{__name__}:byol_fast_loop", arguments=arguments)
    return jobs
