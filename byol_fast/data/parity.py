"""How far our views are from torchvision's: each operator alone, and whole views, with the same drawn parameters.

torchvision is two references. On PIL images, as most training scripts run it, a resize rounds and clips between its
two passes, and the hue has 8 bits. On tensors it does neither, but rounds the colours down after each operator. Each
operator is held against the one that computes it best, and the torchvision loader, which is made of PIL's operators,
against PIL. All errors are in levels of 255.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from byol_fast import config as configs
from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment_params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, crop_windows, draw
from byol_fast.data.integrity import BadImageError
from byol_fast.data.loaders.eval import eval_batches
from byol_fast.data.loaders.factory import dali_installed, make_loader, resolve
from byol_fast.data.loaders.threaded import centre, decoded
from byol_fast.data.sources import ArraySource, ImageSource, SourceError
from byol_fast.models.layers import Normalize

NUM_IMAGES = 64
"""Images that are compared."""

Against = Literal["PIL", "tensors"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Error:
    """Absolute differences of pixels, in levels of 255."""

    max: float
    """The largest."""
    p999: float
    """All but one in a thousand are at most this."""
    mean: float
    """Their mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The largest error that is accepted; infinite where nothing is asked."""

    max: float = math.inf
    p999: float = math.inf
    mean: float = math.inf

    def holds(self, error: Error) -> bool:
        """Whether an error is within the limit."""
        return error.max <= self.max and error.p999 <= self.p999 and error.mean <= self.mean

    def __str__(self) -> str:
        return " / ".join("-" if math.isinf(x) else f"{x:.3g}" for x in (self.max, self.p999, self.mean))


EXACT = Limit(max=0, p999=0, mean=0)
"""Decoding (with DALI's fast IDCT off), flip, solarize: nothing is rounded."""
CROP = Limit(max=36, mean=0.25)
"""At its border DALI repeats a crop's outermost pixels, where torchvision leaves out what lies beyond: up to 7 % of the
weight, in a corner twice. Without antialiasing the mean error is 0.93, the largest 84."""
PART = Limit(max=1, mean=0.5)
"""Brightness, contrast, saturation: we round, torchvision rounds down; half a level on average."""
DESATURATION = Limit(max=2, mean=0.5)
"""Of factors below a half: torchvision rounds down the gray, too, and more than half of that counts."""
HUE_PART = Limit(max=1, mean=0.1)
"""torchvision scales by 255.999 / 255 before it rounds down. (A linear hue, DALI's own, is off by 14.7.)"""
JITTER = Limit(p999=6, mean=1.9)
"""Two random orders of torchvision's jitter differ by 1.1 in the mean. At the 99.9th percentile torchvision's PIL and
its tensors differ by 6; where they differ by more, that much is allowed. To leave out the clips between the parts costs
27 there."""
GRAYSCALE = Limit(max=1, mean=0.03)
"""PIL's luma has .299 and 16 bits; our kernels' and torchvision's tensors' .2989: one rounding in 39 may differ."""
VIEW = Limit(mean=JITTER.mean + CROP.mean)
"""The jitter's and the crop's; the largest errors are at the borders."""
BLUR = Limit(max=1, mean=0.01)
"""The same window in float32: roundings differ where a value lies between two levels."""
BLUR_FLOAT16 = Limit(max=1, mean=0.25)
"""Our kernel's weights, and its values between the two passes, are float16: up to 255 / 2^11 away."""
NORMALISE = Limit(max=1e-4)
"""Three float32 roundings on either side, of values up to 1 / std."""
NVJPEG = Limit(mean=1.9)
"""A GPU's decoder has another IDCT and another chroma upsampling: what is allowed for the jitter."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    operator: str
    """What was compared."""
    backend: str
    """Who computed it."""
    against: Against
    """Which of torchvision's ways it was compared with."""
    error: Error
    """What was found."""
    limit: Limit | None
    """What is allowed; None where the figure is only reported."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its limit."""
        return self.limit is None or self.limit.holds(self.error)


# ---- who makes views -----------------------------------------------------------------------------------------------


class Backend:
    """The loader of a run.

    Args:
        source: the run's images.
        config: of it the views, the seed and `data` are used.
        device: where the views are made.
    """

    def __init__(self, source: ImageSource, config: Config, device: torch.device) -> None:
        made_by = resolve(config.data, source, device)
        self.loader, self.kernels = made_by.loader, made_by.augment == "kernels"
        resolved = {"loader": made_by.loader, "augment": made_by.augment, "prefetch": 1}
        self.config = configs.replace(config, {"data": resolved})
        self.device = device
        library = config.data.color if self.loader == "dali" else "PIL"
        self.name = f"{self.loader}, {'kernels' if self.kernels else library}"
        self.colours: Against = "PIL" if self.loader == "torchvision" and not self.kernels else "tensors"
        """Which of torchvision's ways its colours follow."""
        rounds_twice = self.loader == "torchvision" or (self.loader == "resident" and device.type == "cpu")
        self.crops: Against = "PIL" if rounds_twice else "tensors"
        """Which way its crops follow."""
        self.fused = library == "hsv" and not self.kernels
        """Whether it leaves out the clips between the parts of the jitter."""
        self.nvjpeg = self.loader == "dali" and device.type == "cuda"
        """Whether a GPU decodes."""

    def views(
        self, source: ImageSource, views: tuple[ViewConfig, ViewConfig]
    ) -> tuple[NDArray[np.int64], list[Pixels]]:
        """Both views of all images, `[B, S, S, 3]` each, in the first epoch; and which images they are of."""
        config = dataclasses.replace(self.config, view1=views[0], view2=views[1], batch_size=len(source))
        loader = make_loader(source, config, device=self.device)
        batch = next(loader)
        made = [_array(view) for view in (batch.views[0], batch.views[1])]
        loader.close()
        return batch.index.numpy(), made

    def middles(self, source: ImageSource, side: int) -> Iterator[tuple[int, Pixels]]:
        """The middles of images whose shorter side has so many pixels, decoded and no more; and which they are of."""
        if self.loader == "torchvision":
            for i in range(len(source)):
                yield i, _middle(_array(decoded(source, i))[0] if self.kernels else np.asarray(source.load(i)), side)
            return
        # Evaluation does not resize an image of the right size.
        options: dict[str, Any] = {"loader": self.loader, "threads": self.config.data.threads, "device": self.device}
        for images, index in eval_batches(source, side, 8, **options):
            yield from zip(index.tolist(), _array(images), strict=True)


def backends(source: ImageSource, config: Config, device: torch.device) -> list[Backend]:
    """Everybody who can make views of these images here, the run's own loader first."""
    data = [config.data]
    if dali_installed():
        data += [dataclasses.replace(config.data, loader="dali", augment="library", color=c) for c in _COLORS]
        data.append(dataclasses.replace(config.data, loader="dali", augment="kernels", color="exact"))
    for augment in _AUGMENTS:
        data.append(dataclasses.replace(config.data, loader="torchvision", augment=augment, color="exact"))
    if isinstance(source, ArraySource):
        data.append(dataclasses.replace(config.data, loader="resident", augment="kernels", color="exact"))
    found = [Backend(source, dataclasses.replace(config, data=each), device) for each in data]
    return list({backend.name: backend for backend in found}.values())


_COLORS: tuple[Literal["exact", "hsv"], ...] = ("exact", "hsv")
_AUGMENTS: tuple[Literal["library", "kernels"], ...] = ("library", "kernels")


# ---- torchvision ---------------------------------------------------------------------------------------------------


def torchvision_view(
    image: Image.Image,
    d: ViewDraws,
    i: int,
    view: ViewConfig,
    *,
    crop: Against = "PIL",
    colours: Against = "PIL",
    kernel: int | None = None,
) -> Pixels:
    """A view as torchvision's own functions make it, in its order.

    Args:
        image: RGB.
        d: drawn parameters; row i is this image's.
        i: see `d`.
        view: what the parameters were drawn for.
        crop: whether the crop is made of a PIL image or of a tensor, in floating point.
        colours: whether all that follows is done to PIL images or to uint8 tensors.
        kernel: width of the blur's window; the drawn one when None.

    Returns:
        `[S, S, 3]`.
    """
    x: Any = _crop(image, d, i, view, crop)
    if colours == "tensors":
        x = F.pil_to_tensor(x)
    if d.flip[i]:
        x = F.horizontal_flip(x)
    if d.jitter[i]:
        adjust = {
            BRIGHTNESS: (F.adjust_brightness, view.brightness),
            CONTRAST: (F.adjust_contrast, view.contrast),
            SATURATION: (F.adjust_saturation, view.saturation),
            HUE: (F.adjust_hue, view.hue),
        }
        for part in d.order[i].tolist():
            function, strength = adjust[part]
            if strength > 0:  # ColorJitter leaves a part out that has no range
                x = function(x, float(d.factors[i, part]))
    if d.grayscale[i]:
        x = F.rgb_to_grayscale(x, 3)
    if d.blur[i]:
        window = min(int(d.window[i]) if kernel is None else kernel, 2 * view.size - 1)
        x = F.gaussian_blur(x, [window, window], [float(d.sigma[i])] * 2)
    if d.solarize[i]:
        x = F.solarize(x, view.solarize_threshold)
    if isinstance(x, Image.Image):
        return np.asarray(x)
    pixels: Pixels = x.permute(1, 2, 0).numpy()
    return pixels


def _crop(image: Image.Image, d: ViewDraws, i: int, view: ViewConfig, against: Against) -> Image.Image:
    """What RandomResizedCrop does, with the drawn window."""
    x = F.pil_to_tensor(image).float() if against == "tensors" else image
    top, left, h, w = crop_windows(d.crop[i : i + 1], image.height, image.width, view.aspect)[0].tolist()
    how = F.InterpolationMode(view.interpolation)
    x = F.resized_crop(x, top, left, h, w, [view.size, view.size], interpolation=how, antialias=True)
    made: Image.Image = F.to_pil_image(x.round().clamp(0, 255).to(torch.uint8)) if against == "tensors" else x
    return made


# ---- what is compared ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Check:
    """A view of a group that is compared."""

    name: str
    limit: Limit | None
    against: Against | None = None
    """With which of torchvision's ways; the one that the back end follows when None."""
    crop: bool = False
    """Whether it is all about the crop."""
    number: Literal[0, 1] = 0
    """Which of the two views."""
    kernel: int | None = None
    """The blur's window, where torchvision's is not to be ours."""
    ways: bool = False
    """Whether torchvision's two ways differ: this is reported, and as much is allowed at the 99.9th percentile."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Checks of one pair of views."""

    images: str
    """The user's, or squares of them of the view's `size`, or of `twice` that."""
    views: tuple[ViewConfig, ViewConfig]
    checks: tuple[_Check, ...]


def measure(
    source: ImageSource, config: Config, backends: Sequence[Backend], *, num_images: int = NUM_IMAGES
) -> Iterator[Row]:
    """Compare back ends with torchvision, on some images and with the draws of the first epoch.

    An operator is measured at the strength the run gives it, with probability 1, on crops of the images; operators
    that the run does not use are left out.

    Args:
        source: images; so many are taken, evenly spaced, some twice where there are fewer.
        config: of it the views, the seed, `data` and the model's mean and std are used.
        backends: who is compared.
        num_images: how many images are taken.

    Yields:
        The rows of the table, as they are found.

    Raises:
        BadImageError: an image cannot be read, and `DataConfig.on_bad` is "raise".
    """
    source = _pick(source, config, num_images)
    size, how = config.view1.size, config.view1.interpolation
    encoded = not isinstance(source, ArraySource)
    images = {"user's": source}
    for name, side in (("size", size), ("twice", 2 * size)):
        images[name] = ArraySource(np.stack([centre(source.load(i), side, how) for i in range(len(source))]))
    if encoded:
        found: dict[tuple[str, bool], Error] = {}
        for backend in backends:
            decoder = backend.loader, backend.loader == "torchvision" and backend.kernels
            if decoder not in found:
                found[decoder] = _decoding(source, backend)
            yield Row("decode", backend.name, "PIL", found[decoder], NVJPEG if backend.nvjpeg else EXACT)
    for group in (*_crops(config, encoded), *_operators(config)):
        yield from _measure_group(images[group.images], group, config, backends)
    yield _normalising(images["size"], config, backends[0].device)
    yield from _measure_group(source, _whole_views(config), config, backends)


def _pick(source: ImageSource, config: Config, count: int) -> ImageSource:
    """Evenly spaced images that can be read."""
    chosen = np.arange(count) * len(source) // count
    if config.data.on_bad == "skip":
        good = [i for i in np.unique(chosen).tolist() if _readable(source, i)]
        if not good:
            raise SourceError(f"parity: one of {count} images must be readable, got none; give other images")
        chosen = np.array(good)[np.arange(count) % len(good)]
    return source.subset(chosen)


def _readable(source: ImageSource, i: int) -> bool:
    try:
        source.load(i)
    except BadImageError:
        return False
    return True


_OFF: dict[str, Any] = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
_WHOLE: dict[str, Any] = {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}


def _crops(config: Config, encoded: bool) -> Iterator[_Group]:
    """Crop and resize, from files and from memory."""
    crop = dataclasses.replace(config.view1, **_OFF)
    kinds = {"decode, crop": "user's", "crop": "twice"} if encoded else {"crop": "user's"}
    for name, images in kinds.items():
        judged = _Check(name=name, limit=CROP, crop=True)
        yield _Group(images, (crop, crop), (judged, dataclasses.replace(judged, limit=None, against="PIL")))


def _operators(config: Config) -> Iterator[_Group]:
    """Each operator that the run uses, on its own; two at a time, as there are two views."""
    alone = list(_alone((config.view1, config.view2)))
    for k in range(0, len(alone), 2):
        (view, check), *rest = alone[k : k + 2]
        checks = [check, *(dataclasses.replace(other, number=1) for _, other in rest)]
        yield _Group("size", (view, rest[0][0] if rest else view), tuple(checks))


def _alone(views: tuple[ViewConfig, ViewConfig]) -> Iterator[tuple[ViewConfig, _Check]]:
    def using(coin: str) -> ViewConfig:
        return max(views, key=lambda view: float(getattr(view, coin)))

    def only(coin: str, **changes: Any) -> ViewConfig:
        return dataclasses.replace(using(coin), **_OFF | _WHOLE | {coin: 1.0} | changes)

    view = using("jitter")
    limits = {"brightness": PART, "contrast": PART, "saturation": PART, "hue": HUE_PART}
    if view.saturation > 0.5:
        limits["saturation"] = DESATURATION
    parts = [part for part in limits if getattr(view, part) > 0]
    if using("flip").flip > 0:
        yield only("flip"), _Check(name="flip", limit=EXACT)
    if view.jitter > 0:
        for part in parts:
            others = {other: 0.0 for other in parts if other != part}
            yield only("jitter", **others), _Check(name=part, limit=limits[part])
        if parts:
            yield only("jitter"), _Check(name="jitter", limit=JITTER, ways=True)
    if using("grayscale").grayscale > 0:
        yield only("grayscale"), _Check(name="grayscale", limit=GRAYSCALE, against="PIL")
    if using("blur").blur > 0:
        yield only("blur"), _Check(name="blur", limit=BLUR)
    if using("solarize").solarize > 0:
        yield only("solarize"), _Check(name="solarize", limit=EXACT)


def _whole_views(config: Config) -> _Group:
    """The two views as the run makes them; also beside torchvision's window where ours is narrower."""
    views = (config.view1, config.view2)
    checks: list[_Check] = []
    for number, view in enumerate(views):
        which: Any = {"number": number}
        checks.append(_Check(name=f"view {number + 1}", limit=VIEW, ways=True, **which))
        if view.blur > 0:
            kernel = view.blur_kernel or 23
            checks.append(_Check(name=f"view {number + 1}, blur {kernel}", limit=None, kernel=kernel, **which))
    return _Group("user's", views, tuple(checks))


# ---- comparing -----------------------------------------------------------------------------------------------------


def _measure_group(source: ImageSource, group: _Group, config: Config, backends: Sequence[Backend]) -> Iterator[Row]:
    encoded = not isinstance(source, ArraySource)
    made = []
    for backend in backends:
        index, pixels = backend.views(source, group.views)
        made.append((backend, np.argsort(index), pixels))
    draws = [
        draw(view, np.arange(len(source)), seed=config.seed, epoch=0, view=number)
        for number, view in enumerate(group.views)
    ]
    counts: dict[tuple[_Check, str], NDArray[np.int64]] = defaultdict(lambda: np.zeros(256, np.int64))
    for i in range(len(source)):
        image = source.load(i)
        for check in group.checks:
            view, d = group.views[check.number], draws[check.number]
            wanted = {_ways(check, backend) for backend in backends}
            if check.ways:
                wanted |= {("PIL", "PIL"), ("tensors", "tensors")}
            expected = {
                (crop, colours): torchvision_view(image, d, i, view, crop=crop, colours=colours, kernel=check.kernel)
                for crop, colours in wanted
            }
            for backend, row_of, pixels in made:
                ours = pixels[check.number][row_of[i]]
                counts[check, backend.name] += _differences(ours, expected[_ways(check, backend)])
            if check.ways:
                counts[check, ""] += _differences(expected["PIL", "PIL"], expected["tensors", "tensors"])
    for check in group.checks:
        own = _error(counts[check, ""]) if check.ways else None
        for backend in backends:
            limit = _allowed(check, backend, own, encoded)
            if limit is None and check.crop and check.against == backend.crops:
                continue  # it was held against that already
            crop, colours = _ways(check, backend)
            error = _error(counts[check, backend.name])
            yield Row(check.name, backend.name, crop if check.crop else colours, error, limit)
        if own is not None:
            yield Row(check.name, "torchvision's PIL", "tensors", own, None)


def _ways(check: _Check, backend: Backend) -> tuple[Against, Against]:
    """Which of torchvision's ways, of cropping and of colours, a back end is held against."""
    return (check.against, check.against) if check.against else (backend.crops, backend.colours)


def _allowed(check: _Check, backend: Backend, own: Error | None, encoded: bool) -> Limit | None:
    """What is asked of a back end."""
    limit = check.limit
    if limit is None:
        return None
    if backend.colours == "PIL":
        # Its blur is ours. A rounding of it may fall on the other side of a solarization's threshold.
        return Limit(p999=1, mean=BLUR.mean) if limit in {VIEW, BLUR} else EXACT
    if limit is BLUR:
        return BLUR_FLOAT16 if backend.kernels and backend.device.type == "cuda" else BLUR
    if own is not None:
        limit = dataclasses.replace(limit, p999=math.inf if backend.fused else max(limit.p999, own.p999))
    if encoded and backend.nvjpeg:
        limit = Limit(mean=limit.mean + NVJPEG.mean)
    return limit


def _decoding(source: ImageSource, backend: Backend) -> Error:
    sides = np.array([min(source.load(i).size) for i in range(len(source))])
    counts = np.zeros(256, np.int64)
    for side in np.unique(sides).tolist():
        where = np.flatnonzero(sides == side)
        for i, pixels in backend.middles(source.subset(where), side):
            counts += _differences(pixels, _middle(np.asarray(source.load(int(where[i]))), side))
    return _error(counts)


def _middle(image: Pixels, side: int) -> Pixels:
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _normalising(source: ImageSource, config: Config, device: torch.device) -> Row:
    """What the model does with the bytes that it is given."""
    assert isinstance(source, ArraySource)
    mean, std = config.model.mean, config.model.std
    x = torch.from_numpy(source.images).permute(0, 3, 1, 2)
    ours = _array(Normalize(mean, std).to(device)(x.to(device)))
    theirs = _array(F.normalize(F.to_dtype(x, torch.float32, scale=True), list(mean), list(std)))
    levels = np.abs(ours - theirs) * np.array(std) * 255
    error = Error(float(levels.max()), float(np.quantile(levels, 0.999)), float(levels.mean()))
    return Row("normalise", f"model {device.type}", "tensors", error, NORMALISE)


def _differences(ours: Pixels, theirs: Pixels) -> NDArray[np.int64]:
    """How many values differ by 0, 1, ... 255 levels."""
    return np.bincount(np.abs(ours.astype(np.int16) - theirs).ravel(), minlength=256)


def _error(counts: NDArray[np.int64]) -> Error:
    share = counts.cumsum() / counts.sum()
    return Error(
        max=float(np.flatnonzero(counts)[-1]),
        p999=float((share < 0.999).sum()),
        mean=float(counts @ np.arange(256) / counts.sum()),
    )


def _array(images: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = images.permute(0, 2, 3, 1).cpu().numpy()
    return array


# ---- the table -----------------------------------------------------------------------------------------------------

_LINE = "{:16s} {:20s} {:8s} {:>8s} {:>8s} {:>8s}   {:17s} {}"


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """The table as lines of text, each as soon as its row is there."""
    yield _LINE.format("operator", "by", "against", "max", "99.9 %", "mean", "limit", "").rstrip()
    last = ""
    for row in rows:
        figures = [f"{x:.3g}" for x in dataclasses.astuple(row.error)]
        verdict = ("OK" if row.ok else "FAIL") if row.limit is not None else ""
        name = row.operator if row.operator != last else ""
        last = row.operator
        limit = str(row.limit) if row.limit is not None else "(reported)"
        yield _LINE.format(name, row.backend, row.against, *figures, limit, verdict).rstrip()


def show(rows: Iterable[Row]) -> bool:
    """Print the table as it is found, and what it comes to.

    Returns:
        Whether all errors are within their limits.
    """
    found: list[Row] = []

    def noted() -> Iterator[Row]:
        for row in rows:
            found.append(row)
            yield row

    for line in lines(noted()):
        print(line, flush=True)
    judged, failed = sum(row.limit is not None for row in found), sum(not row.ok for row in found)
    print("errors in levels of 255; limits: largest / 99.9 % / mean")
    print(f"{judged} errors judged, {failed or 'none'} too large")
    return not failed
