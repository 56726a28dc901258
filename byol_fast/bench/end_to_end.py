"""From encoded images to trained weights: a whole loop of ours beside those that people write.

Every contender reads the same images, makes two views of each and takes training steps. On a CPU all its work is done
in its process, with one thread, and CPU time counts; on a GPU the loaders have a process or thread for each core, and
time by the clock counts.
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

from byol_fast.bench import networks
from byol_fast.bench.data import CheapBlur, settle, torchvision_transform
from byol_fast.bench.networks import Problem
from byol_fast.bench.processes import Job
from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data import ImageSource, make_loader, open_source
from byol_fast.utils.env import num_cpus

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, made one image at a time.

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
    """A data loader and a step, some steps a call.

    Args:
        batches: pairs of views without end.
        step: takes them.
        steps: of a call.
        device: the step's.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        step: Callable[[Any], object],
        steps: int,
        device: torch.device,
        *,
        waits: bool = False,
    ) -> None:
        self.batches, self.step, self.steps, self.device, self.settles = batches, step, steps, device, waits
        self.waited, self.worked = 0.0, 0.0

    def __call__(self) -> None:
        """Take the steps of a call."""
        begin = time.perf_counter()
        for _ in range(self.steps):
            before = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - before
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.settles:
            settle()  # what was prepared ahead is paid for by whom it serves
        self.worked += time.perf_counter() - begin

    @property
    def extras(self) -> dict[str, float]:
        """Share of the time that the loop waited for data."""
        return {"data_wait": self.waited / self.worked}


def views_of(problem: Problem) -> tuple[ViewConfig, ViewConfig]:
    """The paper's two views at a problem's size."""
    return ViewConfig(size=problem.image_size), ViewConfig(size=problem.image_size, blur=0.1, solarize=0.2)


def ours(problem: Problem, images: str, steps: int, precision: str, mode: str) -> Loop:
    """Our loader and our step.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: of a call.
        precision: of the step.
        mode: of the step.
    """
    device = torch.device(problem.device)
    view1, view2 = views_of(problem)
    data = DataConfig(threads=1 if device.type == "cpu" else 0)
    config = Config(batch_size=problem.batch_size, data=data, view1=view1, view2=view2)
    loader = make_loader(open_source(Path(images)), config, device=device)
    network = networks.make("Ours", problem, {"precision": precision, "mode": mode})
    return Loop(iter(loader), lambda batch: network.step(batch, 0), steps, device, waits=True)


def textbook(problem: Problem, images: str, steps: int, precision: str, kind: str) -> Loop:
    """Torchvision's transforms of PIL images in a DataLoader, and a plain loop.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: of a call.
        precision: of the textbook's step.
        kind: "textbook" or "lightly".
    """
    device = torch.device(problem.device)
    views, source = views_of(problem), open_source(Path(images))
    transforms: list[Callable[..., Tensor]]
    if kind == "lightly":
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        sizes = (BYOLView1Transform(input_size=views[0].size), BYOLView2Transform(input_size=views[1].size))
        transforms = list(BYOLTransform(*sizes).transforms)
        network = networks.make("Lightly", problem, {})
    else:
        last = [v1.ToTensor(), v1.Normalize(MEAN, STD)]
        blur = CheapBlur(views[0].blur_sigma)
        transforms = [torchvision_transform(v1, view, blur, [], last) for view in views]
        options = {"precision": precision, "channels_last": precision != "fp32"}
        network = networks.make("Textbook", problem, options)
    workers = 0 if device.type == "cpu" else num_cpus()
    loader = DataLoader(
        Pairs(source, transforms),
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

    def step(batch: tuple[Tensor, Tensor]) -> None:
        network.views = [view.to(device, non_blocking=True) for view in batch]
        network()

    return Loop(_endless(loader), step, steps, device)


def _endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[Any]:
    while True:
        yield from loader


def jobs(problem: Problem, images: Path, *, steps: int, precision: str, mode: str, lightly: bool) -> dict[str, Job]:
    """Loops by name; the first is the textbook's.

    Args:
        problem: networks and sizes.
        images: folder of images.
        steps: of a call.
        precision: of ours, and of the faster textbook.
        mode: of ours.
        lightly: whether it is installed.
    """
    common = {"problem": problem, "images": str(images), "steps": steps}

    def plain(kind: str, how: str) -> Job:
        return Job(maker=f"{__name__}:textbook", arguments={**common, "kind": kind, "precision": how})

    found = {"textbook: PIL transforms, DataLoader, fp32": plain("textbook", "fp32")}
    if precision != "fp32":
        found[f"textbook: the same, NHWC, {precision}"] = plain("textbook", precision)
    if lightly:
        found["lightly: BYOLTransform, DataLoader, fp32"] = plain("lightly", "fp32")
    for how in dict.fromkeys(("fp32", precision)):
        found[f"ours, {how}"] = Job(maker=f"{__name__}:ours", arguments={**common, "precision": how, "mode": mode})
    return found
