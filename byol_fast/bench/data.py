"""Two views of images: the loaders of byol_fast, torchvision, lightly and kornia.

All candidates read the same images in the same order and draw their own parameters, from the paper's ranges and
probabilities. On a CPU, CPU time of the whole process is measured, with one thread per candidate; background threads
finish within the measurement. On a GPU, it is wall-clock time until the device is finished, with a thread per core.
Libraries that are not installed are skipped with a line (pip install '.[peers]').

JPEG files give 224 px views with blur; arrays of 32 px images give 32 px views without (CIFAR's recipe).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
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
from byol_fast.data.augment_params import crop_box, sample_augment_params
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.sources import ArraySource, EncodedSource
from byol_fast.utils.env import version
from byol_kernels import resized_crop
from byol_kernels.photometric.params import VALUES

JPEG_VIEWS = (ViewConfig(), ViewConfig(blur_p=0.1, solarize_p=0.2))
ARRAY_VIEWS = (ViewConfig(size=32, blur_p=0.0), ViewConfig(size=32, blur_p=0.0, solarize_p=0.2))
MakeViews = Callable[[], tuple[Tensor, Tensor]]


# -------------------------------------------------------------------------------- byol_fast


def loader_options(device: torch.device) -> dict[str, dict[str, Any]]:
    """Name and options of the loaders of byol_fast; the first is the one that ratios are relative to."""
    threads = {"byol_fast: threaded + kernels": {"loader": "threaded"}}
    device_cache = {"byol_fast: device cache + kernels": {"loader": "device_cache"}}
    dali = {
        "byol_fast: dali + kernels": {"loader": "dali"},
        "byol_fast: dali + its operators": {"loader": "dali", "augment": "dali"},
    }
    dali = dali if dali_installed() else {}
    return dali | device_cache | threads if device.type == "cuda" else threads | device_cache | dali


class LoaderCase:
    """Some batches per call of a loader of byol_fast."""

    def __init__(self, loader: ViewLoader, device: torch.device, num_batches: int) -> None:
        self.loader, self.device, self.num_batches = loader, device, num_batches

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Load the batches and return the views of the last one."""
        for _ in range(self.num_batches):
            batch = next(self.loader)
        if self.device.type == "cpu":
            wait_for_background_threads()
        else:
            torch.cuda.synchronize(self.device)
        return batch.views[0], batch.views[1]


def wait_for_background_threads() -> None:
    """Wait until the process uses no more CPU time."""
    while True:
        before = time.process_time()
        time.sleep(0.03)
        if time.process_time() - before < 0.003:
            return


def loader_cases(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, num_images: int
) -> dict[str, Callable[[], object]]:
    """The loaders of byol_fast on a source, by name."""
    cases: dict[str, Callable[[], object]] = {}
    batch_size = min(num_images, 32 if views[0].size > 64 else 256)
    for name, options in loader_options(device).items():
        if options["loader"] == "device_cache" and not isinstance(source, ArraySource):
            continue
        data = DataConfig(threads=1 if device.type == "cpu" else 0, **options)
        config = Config(batch_size=batch_size, data=data, view1=views[0], view2=views[1])
        cases[name] = LoaderCase(make_loader(source, config, device=device), device, num_images // batch_size)
    return cases


# -------------------------------------------------------------------------------- other libraries


class PILBlur:
    """PIL's blur, which approximates the Gaussian by box filters, as in most training scripts."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(*self.sigma)))  # noqa: NPY002 (numpy's global generator, as in training scripts)


def torchvision_transform(t: Any, view: ViewConfig, blur: Any, last: list[Any]) -> Callable[..., Any]:
    """The paper's augmentation of one image by torchvision's transforms, v1 or v2."""
    jitter = t.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    parts = [
        t.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=v2.InterpolationMode.BICUBIC),
        t.RandomHorizontalFlip(view.hflip_p),
        t.RandomApply([jitter], p=view.color_jitter_p),
        t.RandomGrayscale(view.grayscale_p),
    ]
    parts += [t.RandomApply([blur], p=view.blur_p)] if view.blur_p else []
    parts += [t.RandomSolarize(view.solarize_threshold, view.solarize_p)] if view.solarize_p else []
    composed: Callable[..., Any] = t.Compose([*parts, *last])
    return composed


def library_cases(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, num_images: int
) -> dict[str, Callable[[], object]]:
    """Other libraries on the same source, by name."""
    positions = cycle_positions(len(source), num_images)

    def per_image(load: Callable[[int], Any], transforms: list[Callable[..., Tensor]]) -> MakeViews:
        def make_views() -> tuple[Tensor, Tensor]:
            pairs = [[transform(image) for transform in transforms] for image in map(load, next(positions))]
            first, second = (torch.stack(view) for view in zip(*pairs, strict=True))
            return first, second

        return make_views

    def torchvision_case(t: Any, load: Callable[[int], Any], blur: Any, last: list[Any]) -> MakeViews:
        return per_image(load, [torchvision_transform(t, view, blur, last) for view in views])

    def load_tensor(i: int) -> Tensor:
        return source.load_tensor(i)[0]

    sigma = views[0].blur_sigma
    cases: dict[str, Callable[[], object]] = {}
    if device.type == "cpu":
        to_tensor = [v1.PILToTensor()]
        cases["torchvision v1, PIL" + ", PIL's blur" * bool(views[0].blur_p)] = torchvision_case(
            v1, source.load, PILBlur(sigma), to_tensor
        )
        if views[0].blur_p:
            gaussian = v1.GaussianBlur(views[0].blur_kernel, sigma)
            cases["torchvision v1, PIL, Gaussian blur"] = torchvision_case(v1, source.load, gaussian, to_tensor)
        gaussian = v2.GaussianBlur(views[0].blur_kernel, sigma)
        cases["torchvision v2, tensors"] = torchvision_case(v2, load_tensor, gaussian, [])
        if number := installed_version("lightly"):
            from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

            classes = (BYOLView1Transform, BYOLView2Transform)
            pair = BYOLTransform(
                *(
                    cls(input_size=v.size, gaussian_blur=v.blur_p, solarization_prob=v.solarize_p, normalize=None)
                    for cls, v in zip(classes, views, strict=True)
                )
            )
            cases[f"lightly {number} BYOLTransform (bilinear crops)"] = per_image(source.load, list(pair.transforms))
    if number := installed_version("kornia"):
        cases[f"kornia {number} (crops without antialias)"] = kornia_case(source, views, device, positions)
    return cases


def installed_version(package: str) -> str | None:
    """Version of a package; None with a printed line if it is not installed."""
    number = version(package)
    if number is None:
        print(f"{package} is not installed, skipped (pip install '.[peers]' in the clone)")
    return number


def cycle_positions(n: int, count: int) -> Iterator[list[int]]:
    """Positions of the images of each call, `count` at a time, over and over."""
    start = 0
    while True:
        yield [(start + k) % n for k in range(count)]
        start += count


def kornia_case(
    source: ImageSource, views: tuple[ViewConfig, ViewConfig], device: torch.device, positions: Iterator[list[int]]
) -> MakeViews:
    """kornia: files are decoded and cropped one by one, because their sizes differ; the rest works on batches."""
    import kornia.augmentation as K

    def random_crop(view: ViewConfig) -> Any:
        return K.RandomResizedCrop((view.size, view.size), view.scale, view.ratio, resample="BICUBIC")

    def other_transforms(view: ViewConfig) -> Any:
        parts: list[Any] = [
            K.RandomHorizontalFlip(p=view.hflip_p),
            K.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.color_jitter_p),
            K.RandomGrayscale(p=view.grayscale_p),
        ]
        kernel = (view.blur_kernel, view.blur_kernel)
        parts += [K.RandomGaussianBlur(kernel, view.blur_sigma, p=view.blur_p)] if view.blur_p else []
        parts += [K.RandomSolarize(0.0, 0.0, p=view.solarize_p)] if view.solarize_p else []
        return K.AugmentationSequential(*parts)

    crops, others = [random_crop(view) for view in views], [other_transforms(view) for view in views]

    def load_floats(rows: list[int]) -> list[Tensor]:
        if isinstance(source, ArraySource):
            return [torch.from_numpy(source.images[rows]).to(device).permute(0, 3, 1, 2).float() / 255]
        return [source.load_tensor(i).to(device).float() / 255 for i in rows]

    def make_views() -> tuple[Tensor, Tensor]:
        images = load_floats(next(positions))
        first, second = (other(torch.cat([crop(x) for x in images])) for crop, other in zip(crops, others, strict=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return first, second

    return make_views


# -------------------------------------------------------------------------------- suites


def check_levels(cases: dict[str, Callable[[], Any]]) -> None:
    """Compare mean and standard deviation of the views: parameters are random, so only gross errors show.

    Raises:
        AssertionError: a candidate differs from the median by more than 20 levels of 255 and five standard errors.
    """
    levels: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for name, call in cases.items():
        views = [view.float().cpu().flatten(1) * (255 if view.is_floating_point() else 1) for view in call()]
        images = torch.stack([torch.stack([view.mean(1), view.std(1)]) for view in views])
        levels[name], errors[name] = images.mean(2), images.std(2, correction=0) / math.sqrt(images.shape[2])
    expected = torch.stack(list(levels.values())).median(0).values
    largest_error = torch.stack(list(errors.values())).amax(0)
    for name, values in levels.items():
        if not ((values - expected).abs() <= 20 + 5 * largest_error).all():
            raise AssertionError(
                f"{name}: mean and std of the levels are {values.tolist()}, of all candidates {expected.tolist()}"
            )


def run_suite(
    results: Results,
    suite: str,
    source: ImageSource,
    views: tuple[ViewConfig, ViewConfig],
    *,
    num_images: int,
    rounds: int,
    is_selected: Callable[[str], bool] = lambda name: True,
) -> None:
    """Two views of images, by all candidates.

    Args:
        results: that the suite is added to.
        suite: its name.
        source: of the images.
        views: options of both views.
        num_images: images per call.
        rounds: rounds that are counted.
        is_selected: True for the names of candidates to measure.
    """
    device = results.device
    cases = loader_cases(source, views, device, num_images) | library_cases(source, views, device, num_images)
    cases = {name: case for name, case in cases.items() if is_selected(name)}
    check_levels(cases)
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times = interleaved(cases, rounds=rounds, clock=clock, description=suite)
    baseline = next((name for name in cases if not name.startswith("byol_fast")), "")
    results.add(suite, times, unit="images/CPU-s" if on_cpu else "images/s", num_items=num_images, baseline=baseline)


def stages(results: Results, source: ImageSource, *, num_images: int, rounds: int) -> None:
    """The operations of the CPU loader, one at a time, with the operations of PIL.

    Args:
        results: that the suites are added to.
        source: of the images.
        num_images: images per call.
        rounds: rounds that are counted.
    """
    num_images = min(num_images, len(source))
    encoded = [source.read(i) for i in range(num_images)] if isinstance(source, EncodedSource) else []
    tensors = [source.load_tensor(i) for i in range(num_images)]
    pil_images = [source.load(i) for i in range(num_images)]
    crops: list[Tensor] = []
    suites: dict[str, dict[str, Callable[[], object]]] = {
        "decode": {
            "byol_fast: torchvision's operator": lambda: [source.load_tensor(i) for i in range(num_images)],
            "PIL": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded],
        }
    }
    for number, view in enumerate(JPEG_VIEWS):
        params = sample_augment_params(view, np.arange(num_images), seed=0, epoch=0, view=number)
        boxes = [crop_box(params.crop_candidates[i], x.shape[2], x.shape[3], view.ratio) for i, x in enumerate(tensors)]
        corners = [(left, top, left + w, top + h) for top, left, h, w in boxes]

        def crop(view: ViewConfig = view, boxes: Tensor = torch.tensor(boxes)) -> Tensor:  # noqa: B008
            pairs = zip(tensors, boxes[:, None], strict=True)
            return torch.cat([resized_crop(x, box, view.size) for x, box in pairs])

        def crop_pil(view: ViewConfig = view, corners: list[Any] = corners) -> object:
            size, cubic = (view.size, view.size), Image.Resampling.BICUBIC
            return [x.crop(box).resize(size, cubic) for x, box in zip(pil_images, corners, strict=True)]

        crops.append(crop())
        names = required_params(view)
        blur = tuple(name for name in names if name in {"blur", *VALUES["blur"]})
        color = tuple(name for name in names if name not in blur)

        def photometric_case(
            names: tuple[str, ...], view: ViewConfig = view, params: Any = params, number: int = number
        ) -> Callable[[], object]:
            selected = select_rows(params, names, slice(None))
            return lambda: apply_photometric(crops[number], selected, view)

        suites |= {
            f"view {number + 1}: crop": {"byol_fast: resized_crop": crop, "PIL": crop_pil},
            f"view {number + 1}: flip, color, blur, solarize": {
                "byol_fast: photometric": photometric_case(names),
                "byol_fast: without blur": photometric_case(color),
                "byol_fast: blur alone": photometric_case(blur),
            },
        }
    for suite, cases in suites.items():
        times = interleaved(cases, rounds=rounds, clock=time.process_time)
        results.add(f"stages, {suite}", times, unit="images/CPU-s", num_items=num_images)


def small_arrays(source: ImageSource) -> ArraySource:
    """2,048 images of 32 px in an array, from the images of a source."""
    small = [np.asarray(source.load(i).resize((32, 32))) for i in range(min(len(source), 256))]
    return ArraySource(np.stack([small[i % len(small)] for i in range(2048)]), name="small images")
