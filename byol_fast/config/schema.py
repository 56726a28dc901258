"""Configuration of a run: frozen dataclasses with validated fields.

A recipe (`byol_fast.config.recipes`) is a function that returns a `Config`; the command line overrides single
fields of it; the run folder keeps the result as `config.json`. The docstrings of the fields are the texts of `--help`.
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """Invalid value or unknown field of a configuration."""


def _require(ok: bool, where: str, contract: str, got: object, fix: str = "") -> None:
    if not ok:
        raise ConfigError(f"config: {where} must {contract}, got {got!r}{'; ' + fix if fix else ''}")


def _probability(where: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, where, "be a probability between 0 and 1", value)


def _positive(where: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, where, "be positive", value)


def _not_negative(where: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, where, "be zero or more", value)


def _check_choices(config: object, prefix: str = "") -> None:
    """Raise a ConfigError for a field with a value that its `Literal` type does not list."""
    for name, choices in _choices(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            fix = f"did you mean {near[0]!r}?" if near else ""
            _require(False, f"{prefix}{name}", f"be one of {', '.join(choices)}", value, fix)


@functools.cache
def _choices(config_type: type) -> dict[str, tuple[str, ...]]:
    """Values of the fields with a `Literal` type."""
    hints = get_type_hints(config_type).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Augmentation of one view; the defaults are view 1 of the paper (appendix B)."""

    size: int = 224
    """Height and width of the view in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image's, smallest and largest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, smallest and largest; its logarithm is uniform."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter that resizes the crop (always antialiased)."""
    hflip_p: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter_p: float = 0.8
    """Probability of the color jitter; its four adjustments are applied in random order."""
    brightness: float = 0.4
    """The brightness factor is uniform on 1 - brightness .. 1 + brightness."""
    contrast: float = 0.4
    """The contrast factor (about the mean of the gray image) is uniform on 1 - contrast .. 1 + contrast."""
    saturation: float = 0.2
    """The saturation factor is uniform on 1 - saturation .. 1 + saturation."""
    hue: float = 0.1
    """The hue shift is uniform on -hue .. hue, in turns (0.5 is the opposite color)."""
    grayscale_p: float = 0.2
    """Probability of the conversion to gray."""
    blur_p: float = 1.0
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, smallest and largest."""
    blur_kernel: int = 23
    """Largest width of the blur kernel in pixels, odd (it covers three sigma to each side); 0 for no limit."""
    solarize_p: float = 0.0
    """Probability of solarization: values at or above the threshold are inverted."""
    solarize_threshold: int = 128
    """Threshold of the solarization, 0..256."""

    def __post_init__(self) -> None:
        _require(1 <= self.size <= 8192, "view.size", "be 1..8192 pixels", self.size)
        for name in self.__slots__:
            if name.endswith("_p"):
                _probability(f"view.{name}", getattr(self, name))
        lo, hi = self.scale
        _require(0 < lo <= hi <= 1, "view.scale", "be two rising fractions within (0, 1]", self.scale)
        lo, hi = self.ratio
        _require(0 < lo <= hi and math.isfinite(hi), "view.ratio", "be two rising positive ratios", self.ratio)
        _check_choices(self, "view.")
        for name in ("brightness", "contrast", "saturation"):
            _not_negative(f"view.{name}", getattr(self, name))
        _require(0 <= self.hue <= 0.5, "view.hue", "be 0..0.5 turns", self.hue)
        lo, hi = self.blur_sigma
        _require(
            0 < lo <= hi and math.isfinite(hi), "view.blur_sigma", "be two rising positive widths", self.blur_sigma
        )
        kernel = self.blur_kernel
        _require(kernel == 0 or (kernel > 0 and kernel % 2 == 1), "view.blur_kernel", "be 0 or odd", kernel)
        _require(0 <= self.solarize_threshold <= 256, "view.solarize_threshold", "be 0..256", self.solarize_threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images, data loader and augmentation back end."""

    root: Path | None = None
    """Images: a folder (nested, flat or class-per-folder), a list (.txt, .csv), tar shards (`train-{000..127}.tar`, a
    folder of them), Parquet files, or a `.npz` with uint8 `images` (and `labels`). A folder with `train` and `val` or
    `test` inside is split accordingly. Empty: the recipe's own data set, if it has one."""
    builtin: Literal["none", "cifar10", "demo"] = "none"
    """Data set without a root: CIFAR-10 (downloaded by torchvision) or the packaged Fashion-MNIST."""
    cache: Path = Path("~/.cache/byol_fast")
    """Folder for downloaded data sets, indexes of tar shards and copies of Parquet files."""
    image_column: str = ""
    """Parquet, Hugging Face and lists: column of the images or their paths; empty: detected by name and type."""
    label_column: str = ""
    """Parquet, Hugging Face and lists: column of the class numbers or names; empty: detected by name."""
    loader: Literal["auto", "dali", "threaded", "device_cache"] = "auto"
    """Data loader: `dali`; `threaded` (CPU threads with torchvision's decoder); or `device_cache` (arrays that are kept
    on the device). auto: on a GPU device_cache for arrays that fit, otherwise dali if it is installed; on a CPU
    threaded."""
    augment: Literal["kernels", "dali"] = "kernels"
    """Augmentation after the crop (color, grayscale, blur, solarize): our kernels, with every loader; or `dali`: all
    views entirely by DALI's own operators, which requires loader dali (or auto, which is dali then)."""
    hw_decoder_load: float = 0.65
    """Fraction of the JPEGs that DALI decodes on a GPU's hardware decoder, if it has one."""
    threads: int = 0
    """Decoding and augmentation threads; 0: one per core of the process; with 1, a dataset is read item by item."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """Images that cannot be read: `raise` ends the run (progress is saved); `skip` replaces them by other images and
    lists them in `corrupt_images.jsonl`. A damaged tar shard: `raise` is an error at the start; `skip` uses the images
    in front of the damage."""
    max_corrupt_fraction: float = 0.01
    """With on_corrupt skip: stop if more than this fraction of the images (and more than 100, or half of all) is
    corrupt."""
    accept_changed: bool = False
    """Resume although images were added, removed or renamed since the run was started; it is then not bit-exact."""

    def __post_init__(self) -> None:
        _check_choices(self, "data.")
        if self.augment == "dali":
            contract, fix = "be auto or dali with data.augment=dali", "set --data.augment kernels"
            _require(self.loader in ("auto", "dali"), "data.loader", contract, self.loader, fix)
        _probability("data.hw_decoder_load", self.hw_decoder_load)
        _not_negative("data.threads", self.threads)
        _positive("data.prefetch", self.prefetch)
        _probability("data.max_corrupt_fraction", self.max_corrupt_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Encoder and heads."""

    encoder: str = "resnet50"
    """Torchvision classification model, or `timm/NAME` if timm is installed; its classifier is removed."""
    cifar_stem: bool = False
    """Replace a ResNet's stem for small images: 3x3 convolution, stride 1, padding 1, no max-pool."""
    zero_init_residual: bool = False
    """ResNets: initialize every residual block as the identity (weight of its last norm = 0)."""
    pretrained: bool = False
    """Initialize the encoder with torchvision's default weights (downloaded, or from torch's cache)."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor (with SimSiam of the projector)."""
    projection_dim: int = 256
    """Size of projections and predictions."""
    projector_layers: int = 2
    """Linear layers of the projector (SimSiam on ImageNet has 3)."""
    predictor_hidden_dim: int = 512
    """SimSiam only: width of the predictor's hidden layer (BYOL's is hidden_dim)."""
    last_bias: bool = False
    """BYOL only: give the last linear layer of the heads a bias (the reference has none)."""
    view_batching: Literal["batched", "separate", "concat"] = "batched"
    """Forward passes of two views: one pass with batch-norm statistics of each view (`batched`: equal to separate
    passes, and faster), two passes (`separate`), or one pass with common statistics (`concat`: another algorithm)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, of values from 0 to 1, for the normalization of the input."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations, of values from 0 to 1, for the normalization of the input."""

    def __post_init__(self) -> None:
        _require(bool(self.encoder), "model.encoder", "name a model", self.encoder)
        _positive("model.hidden_dim", self.hidden_dim)
        _positive("model.projection_dim", self.projection_dim)
        _require(2 <= self.projector_layers <= 8, "model.projector_layers", "be 2..8", self.projector_layers)
        _positive("model.predictor_hidden_dim", self.predictor_hidden_dim)
        _check_choices(self, "model.")
        for value in self.mean:
            _require(math.isfinite(value), "model.mean", "be three finite numbers", self.mean)
        for value in self.std:
            _require(math.isfinite(value) and value > 0, "model.std", "be three positive numbers", self.std)


METHOD_OPTIONS = {"last_bias": "byol", "predictor_hidden_dim": "simsiam"}
"""Fields of `ModelConfig` that one method alone uses, and the method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "lars"
    """LARS as in the reference implementation, or torch's SGD, Adam, AdamW."""
    lr: float = 0.2
    """Base learning rate, for a batch of 256."""
    scale_lr: bool = True
    """Multiply the base learning rate by batch size / 256; usually off for Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warmup: cosine to 0, or constant."""
    warmup_epochs: float = 10.0
    """Epochs of linear warmup from 0; at most a quarter of the run."""
    warmup_steps: int | None = None
    """Steps of linear warmup, used as given; replaces warmup_epochs."""
    momentum: float = 0.9
    """Momentum of LARS and SGD."""
    weight_decay: float = 1.5e-6
    """Weight decay."""
    decay_1d: bool = False
    """Apply weight decay and LARS's adaptation to biases and norms, too; the reference does not, SimSiam does."""
    constant_predictor_lr: bool = False
    """Keep the predictor's learning rate constant after the warmup, with any schedule (SimSiam)."""
    trust_coefficient: float = 1e-3
    """LARS trust coefficient."""

    def __post_init__(self) -> None:
        _check_choices(self, "optim.")
        _positive("optim.lr", self.lr)
        _not_negative("optim.warmup_epochs", self.warmup_epochs)
        if self.warmup_steps is not None:
            _not_negative("optim.warmup_steps", self.warmup_steps)
        _require(0 <= self.momentum < 1, "optim.momentum", "be within [0, 1)", self.momentum)
        _not_negative("optim.weight_decay", self.weight_decay)
        _positive("optim.trust_coefficient", self.trust_coefficient)


@dataclass(frozen=True, kw_only=True, slots=True)
class TauConfig:
    """EMA of the target network: target = tau * target + (1 - tau) * online, after every optimizer step."""

    base: float = 0.996
    """Tau at the first step."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Cosine from base to 1 over the run (as in the paper), or constant."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.base <= 1.0, "tau.base", "be between 0 and 1", self.base)
        _check_choices(self, "tau.")


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNConfig:
    """k-nearest-neighbor evaluation of the online encoder during training; labels are not used for training."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: if the training images have labels (class folders) and there are validation images."""
    val_root: Path | None = None
    """Validation images with the same classes; empty: `val` or `test` beside `train` in data.root."""
    every_epochs: int = 10
    """Epochs between evaluations; also before the first step and after the last."""
    k: int = 20
    """Number of neighbors."""
    temperature: float = 0.07
    """Temperature of the votes, which are weighted by exp(cosine similarity / temperature)."""
    max_train: int = 0
    """Largest number of training images to compare with, evenly spaced; 0 means all."""

    def __post_init__(self) -> None:
        _check_choices(self, "knn.")
        _positive("knn.every_epochs", self.every_epochs)
        _positive("knn.k", self.k)
        _positive("knn.temperature", self.temperature)
        _not_negative("knn.max_train", self.max_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Linear classifier trained online on detached features of the encoder; it does not change the training."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: if the training images have labels (class folders)."""
    lr: float = 1e-3
    """Learning rate of the classifier (Adam)."""

    def __post_init__(self) -> None:
        _check_choices(self, "probe.")
        _positive("probe.lr", self.lr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Configuration of a pre-training run."""

    recipe: str = "custom"
    """Name of the recipe that this configuration is based on."""
    method: Literal["byol", "simsiam"] = "byol"
    """BYOL, or SimSiam: the online network is its own target, without EMA."""
    name: str = ""
    """Name of the run; its folder is OUT/NAME. Empty: recipe, date and time."""
    out: Path = Path("runs")
    """Folder in which run folders are created."""
    seed: int = 0
    """Seed of weights, shuffling and augmentation."""
    epochs: int = 100
    """Passes over the training images."""
    steps: int = 0
    """Total number of optimizer steps; 0: determined by epochs."""
    batch_size: int = 256
    """Images per batch and process (each gives two views)."""
    grad_accum_steps: int = 1
    """Batches whose gradients are averaged for one optimizer step and one target update. The learning rate scales with
    batch_size * grad_accum_steps * processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """Arithmetic of the networks (weights stay fp32). auto: bf16 on GPUs and CPUs with bf16 instructions; fp16 scales
    the loss automatically; tf32 is fp32 with TF32 products on a GPU."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """Execution of a step: eager, compiled by torch.compile, or compiled and captured into a CUDA graph. auto: the run
    logs its choice and the reason."""
    max_autotune: bool = False
    """If the step is compiled: let inductor time several variants of each kernel (max-autotune). For a ResNet-50 this
    is estimated to take 25 to 60 minutes before the first step."""
    cudnn_benchmark: bool = False
    """On a GPU: let cuDNN time its algorithms for each convolution in the first steps and use the fastest
    (torch.backends.cudnn.benchmark)."""
    activation_checkpointing: bool = False
    """Store only the inputs of the encoder's blocks for the backward pass and recompute the rest: less memory, about a
    third more time."""
    sync_batchnorm: bool = True
    """With several processes: compute batch-norm statistics over all of them (as the reference does)."""
    max_skipped_steps: int = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; each is skipped and counted."""
    channels_last: bool = True
    """Use the channels_last (NHWC) memory format."""
    log_every: int = 10
    """Steps between writes to metrics.jsonl, which has a record of every step. Without a terminal, the log shows one of
    these steps, at most every ten seconds."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: an epoch, or as many whole epochs as make 100 steps."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep besides the one with the best kNN accuracy; older ones are deleted."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard, too, into `tb` of the run folder."""
    timeout_minutes: float = 30.0
    """With several processes: timeout of collective operations, in minutes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and data loader."""
    view1: ViewConfig = field(default_factory=ViewConfig)
    """Augmentation of the first view."""
    view2: ViewConfig = field(default_factory=lambda: ViewConfig(blur_p=0.1, solarize_p=0.2))
    """Augmentation of the second view."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and heads."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    tau: TauConfig = field(default_factory=TauConfig)
    """EMA of the target network."""
    knn: KNNConfig = field(default_factory=KNNConfig)
    """kNN evaluation during training."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Linear classifier trained online."""

    def __post_init__(self) -> None:
        _require("/" not in self.name and self.name not in {".", ".."}, "name", "be a plain folder name", self.name)
        _require(0 <= self.seed < 2**31, "seed", "be 0..2147483647", self.seed)
        _positive("epochs", self.epochs)
        _not_negative("steps", self.steps)
        _require(self.batch_size >= 2, "batch_size", "be 2 or more", self.batch_size, "batch normalization needs 2")
        _check_choices(self)
        for option, method in METHOD_OPTIONS.items():
            value, default = getattr(self.model, option), ModelConfig.__dataclass_fields__[option].default
            contract = f"be its default with method {self.method}, which has no such option"
            fix = f"set it to {default!r}"
            _require(self.method == method or value == default, f"model.{option}", contract, value, fix)
        _positive("grad_accum_steps", self.grad_accum_steps)
        _positive("max_skipped_steps", self.max_skipped_steps)
        _positive("timeout_minutes", self.timeout_minutes)
        _positive("log_every", self.log_every)
        _not_negative("checkpoint_every", self.checkpoint_every)
        _positive("keep_checkpoints", self.keep_checkpoints)
        _require(
            self.view1.size == self.view2.size,
            "view2.size",
            f"equal view1.size ({self.view1.size})",
            self.view2.size,
            "both views go through the same networks; set both sizes",
        )
