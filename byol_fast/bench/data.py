"""Two views of images: ours, with every loader, beside torchvision, lightly and kornia.

Everyone gets the same images in the same order and draws for himself, by the paper's ranges and probabilities. On a
CPU the measure is CPU time of the whole process, all threads counted, with one thread for each contender; what ours
prepare ahead is waited for within the measurement. On a GPU it is time by the clock, until the device is done, with a
thread for each core. Peers that are not installed are left out, with a line (pip install byol_fast[peers]).

Photographs are 224 px views of JPEG files, with blur; arrays are 32 px views of 32 px images, without (CIFAR's recipe).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from byol_fast.bench.results import Results
from byol_fast.bench.timing import interleaved
from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data import ImageSource, ViewLoader, make_loader
from byol_fast.data.augment import apply_photometric, required_params, select_rows
from byol_fast.data.augment_params import crop_windows, sample_params
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.loaders.threaded import decode_image
from byol_fast.data.sources import ArraySource, EncodedSource
from byol_fast.utils.env import version
from byol_kernels import resized_crop

JPEG_VIEWS = (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2))
ARRAY_VIEWS = (ViewConfig(size=32, blur=0.0), ViewConfig(size=32, blur=0.0, solarize=0.2))
Make = Callable[[], tuple[Tensor, Tensor]]
CPU = torch.device("cpu")


# -------------------------------------------------------------------------------- ours


def ours(device: torch.device) -> dict[str, dict[str, Any]]:
    """Name and options of our loaders; the first is what the others are compared with."""
    threads = {"ours: torchvision + kernels": {"loader": "torchvision"}}
    resident = {"ours: resident": {"loader": "resident"}}
    dali = {
        "ours: dali + kernels": {"loader": "dali"},
        "ours: dali + its operators": {"loader": "dali", "augment": "dali"},
    }
    dali = dali if dali_installed() else {}
    return dali | resident | threads if device.type == "cuda" else threads | resident | dali


class Stream:
    """A loader of ours, batch after batch."""

    def __init__(self, loader: ViewLoader, device: torch.device, steps: int) -> None:
        self.loader, self.device, self.steps = loader, device, steps

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Make a call's images; the last batch of views."""
        for _ in range(self.steps):
            batch = next(self.loader)
        if self.device.type == "cpu":
            settle()
        else:
            torch.cuda.synchronize(self.device)
        return batch.views[0], batch.views[1]


def settle() -> None:
    """Wait until threads in the background have nothing left to prepare."""
    while True:
        before = time.process_time()
        time.sleep(0.03)
        if time.process_time() - before < 0.003:
            return


def our_loaders(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, images: int
) -> dict[str, Callable[[], object]]:
    """Our loaders on a source, by name."""
    found: dict[str, Callable[[], object]] = {}
    batch = min(images, 32 if views[0].size > 64 else 256)
    for name, options in ours(device).items():
        if options["loader"] == "resident" and not isinstance(source, ArraySource):
            continue
        data = DataConfig(threads=1 if device.type == "cpu" else 0, **options)
        config = Config(batch_size=batch, data=data, view1=views[0], view2=views[1])
        found[name] = Stream(make_loader(source, config, device=device), device, images // batch)
    return found


# -------------------------------------------------------------------------------- peers


class CheapBlur:
    """PIL's own blur: an approximation by boxes, as most training scripts have it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(*self.sigma)))  # noqa: NPY002 (its own seed)


def torchvision_transform(t: Any, view: ViewConfig, blur: Any, first: list[Any], last: list[Any]) -> Callable[..., Any]:
    """The paper's augmentation of one image by torchvision's transforms, of either generation."""
    jitter = t.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    parts = [
        t.RandomResizedCrop(view.size, view.area, view.aspect, interpolation=v2.InterpolationMode.BICUBIC),
        t.RandomHorizontalFlip(view.flip),
        t.RandomApply([jitter], p=view.jitter),
        t.RandomGrayscale(view.grayscale),
    ]
    parts += [t.RandomApply([blur], p=view.blur)] if view.blur else []
    parts += [t.RandomSolarize(view.solarize_threshold, view.solarize)] if view.solarize else []
    composed: Callable[..., Any] = t.Compose([*first, *parts, *last])
    return composed


def peers(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, images: int
) -> dict[str, Callable[[], object]]:
    """Other packages on the same source."""
    turn = iter_numbers(len(source), images)

    def one_by_one(load: Callable[[int], Any], transforms: list[Callable[..., Tensor]]) -> Make:
        def make() -> tuple[Tensor, Tensor]:
            made = [[transform(image) for transform in transforms] for image in map(load, next(turn))]
            first, second = (torch.stack(view) for view in zip(*made, strict=True))
            return first, second

        return make

    def by_torchvision(t: Any, load: Callable[[int], Any], blur: Any, last: list[Any]) -> Make:
        return one_by_one(load, [torchvision_transform(t, view, blur, [], last) for view in views])

    def tensor(i: int) -> Tensor:
        return decode_image(source, i)[0]

    sigma = views[0].blur_sigma
    found: dict[str, Callable[[], object]] = {}
    if device.type == "cpu":
        to_tensor = [v1.PILToTensor()]
        found["torchvision v1, PIL" + ", its cheap blur" * bool(views[0].blur)] = by_torchvision(
            v1, source.load, CheapBlur(sigma), to_tensor
        )
        if views[0].blur:
            gaussian = v1.GaussianBlur(views[0].blur_kernel, sigma)
            found["torchvision v1, PIL, Gaussian blur"] = by_torchvision(v1, source.load, gaussian, to_tensor)
        gaussian = v2.GaussianBlur(views[0].blur_kernel, sigma)
        found["torchvision v2, tensors"] = by_torchvision(v2, tensor, gaussian, [])
        if found_version := installed("lightly"):
            from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

            kinds = (BYOLView1Transform, BYOLView2Transform)
            both = BYOLTransform(
                *(
                    kind(input_size=v.size, gaussian_blur=v.blur, solarization_prob=v.solarize, normalize=None)
                    for kind, v in zip(kinds, views, strict=True)
                )
            )
            found[f"lightly {found_version} BYOLTransform (bilinear crops)"] = one_by_one(
                source.load, list(both.transforms)
            )
    if found_version := installed("kornia"):
        found[f"kornia {found_version} (crops without antialias)"] = kornia_views(source, views, device, turn)
    return found


def installed(package: str) -> str | None:
    """Version of a package, or None with a line that says so."""
    found = version(package)
    if found is None:
        print(f"{package} is not installed: left out (pip install byol_fast[peers])")
    return found


def iter_numbers(n: int, count: int) -> Iterator[list[int]]:
    """Positions of the images of call after call."""
    start = 0
    while True:
        yield [(start + k) % n for k in range(count)]
        start += count


def kornia_views(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, turn: Iterator[list[int]]
) -> Make:
    """Decoded and cropped one by one, as sizes differ; arrays in one batch. Then all at once."""
    import kornia.augmentation as K

    def crop(view: ViewConfig) -> Any:
        return K.RandomResizedCrop((view.size, view.size), view.area, view.aspect, resample="BICUBIC")

    def rest(view: ViewConfig) -> Any:
        parts: list[Any] = [
            K.RandomHorizontalFlip(p=view.flip),
            K.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
            K.RandomGrayscale(p=view.grayscale),
        ]
        kernel = (view.blur_kernel, view.blur_kernel)
        parts += [K.RandomGaussianBlur(kernel, view.blur_sigma, p=view.blur)] if view.blur else []
        parts += [K.RandomSolarize(0.0, 0.0, p=view.solarize)] if view.solarize else []
        return K.AugmentationSequential(*parts)

    crops, rests = [crop(view) for view in views], [rest(view) for view in views]

    def floats(numbers: list[int]) -> list[Tensor]:
        if isinstance(source, ArraySource):
            return [torch.from_numpy(source.images[numbers]).to(device).permute(0, 3, 1, 2).float() / 255]
        return [decode_image(source, i).to(device).float() / 255 for i in numbers]

    def make() -> tuple[Tensor, Tensor]:
        images = floats(next(turn))
        first, second = (after(torch.cat([cut(x) for x in images])) for cut, after in zip(crops, rests, strict=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return first, second

    return make


# -------------------------------------------------------------------------------- suites


def check(cases: dict[str, Callable[[], Any]]) -> None:
    """Everyone makes views whose levels are alike; draws differ, so only gross errors show."""
    levels: dict[str, Tensor] = {}
    for name, call in cases.items():
        views = [view.float().cpu() * (255 if view.is_floating_point() else 1) for view in call()]
        levels[name] = torch.stack([torch.stack([view.mean(), view.std()]) for view in views])
    expected = torch.stack(list(levels.values())).median(0).values
    for name, found in levels.items():
        if not ((found - expected).abs() <= 20).all():
            raise AssertionError(
                f"{name}: mean and std of the levels are {found.tolist()}, others' {expected.tolist()}"
            )


def run_suite(
    results: Results,
    suite: str,
    source: ImageSource,
    views: tuple[ViewConfig, ViewConfig],
    *,
    images: int,
    rounds: int,
    only: Sequence[str] = (),
) -> None:
    """Two views of images, by everyone.

    Args:
        results: where to put it.
        suite: its name.
        source: of the images.
        views: how both are drawn.
        images: of a call.
        rounds: that count.
        only: contenders whose name contains one of these; all where empty.
    """
    device = results.device
    cases = our_loaders(source, views, device, images) | peers(source, views, device, images)
    cases = {name: case for name, case in cases.items() if not only or any(o in name for o in only)}
    check(cases)
    on_cpu = device.type == "cpu"
    times = interleaved(cases, rounds=rounds, clock=time.process_time if on_cpu else time.perf_counter)
    baseline = next((name for name in cases if not name.startswith("ours")), "")
    results.add(suite, times, unit="images/CPU-s" if on_cpu else "images/s", amount=images, baseline=baseline)


def stages(results: Results, source: ImageSource, *, images: int, rounds: int) -> None:
    """What the first of our loaders does, one thing at a time, each beside what else could do it."""
    images = min(images, len(source))
    encoded = [source.read(i) for i in range(images)] if isinstance(source, EncodedSource) else []
    tensors, pictures = [decode_image(source, i) for i in range(images)], [source.load(i) for i in range(images)]
    crops: list[Tensor] = []
    suites: dict[str, dict[str, Callable[[], object]]] = {
        "decode": {
            "ours: torchvision's operator": lambda: [decode_image(source, i) for i in range(images)],
            "PIL": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded],
        }
    }
    for number, view in enumerate(JPEG_VIEWS):
        drawn = sample_params(view, np.arange(images), seed=0, epoch=0, view=number)
        windows = [
            crop_windows(drawn.crop[i : i + 1], *x.shape[2:], view.aspect)  # type: ignore[call-arg]
            for i, x in enumerate(tensors)
        ]
        boxes = [(s, t, s + w, t + h) for ((t, s, h, w),) in (window.tolist() for window in windows)]

        def crop(view: ViewConfig = view, windows: list[Any] = windows) -> Tensor:
            pairs = zip(tensors, windows, strict=True)
            return torch.cat([resized_crop(x, torch.from_numpy(window), view.size) for x, window in pairs])

        def crop_pil(view: ViewConfig = view, boxes: list[Any] = boxes) -> object:
            size, cubic = (view.size, view.size), Image.Resampling.BICUBIC
            return [x.crop(box).resize(size, cubic) for x, box in zip(pictures, boxes, strict=True)]

        crops.append(crop())
        names = required_params(view)
        blur = tuple(name for name in names if name in {"blur", "sigma", "window"})
        colour = tuple(name for name in names if name not in blur)

        def augment_crops(
            names: tuple[str, ...], view: ViewConfig = view, drawn: Any = drawn, number: int = number
        ) -> Callable[[], object]:
            draws = select_rows(drawn, names, slice(None))
            return lambda: apply_photometric(crops[number], draws, view)

        suites |= {
            f"view {number + 1}: crop": {"ours: resized_crop": crop, "PIL": crop_pil},
            f"view {number + 1}: flip, colour, blur, solarize": {
                "ours: photometric, all of it": augment_crops(names),
                "ours: without the blur": augment_crops(colour),
                "ours: the blur alone": augment_crops(blur),
            },
        }
    for suite, cases in suites.items():
        times = interleaved(cases, rounds=rounds, clock=time.process_time)
        results.add(f"stages, {suite}", times, unit="images/CPU-s", amount=images)


def small_arrays(source: ImageSource) -> ArraySource:
    """Images of a source as an array of 2,048 images of 32 px."""
    small = [np.asarray(source.load(i).resize((32, 32))) for i in range(min(len(source), 256))]
    return ArraySource(np.stack([small[i % len(small)] for i in range(2048)]), name="small photographs")
