"""What a run is: frozen dataclasses, every field validated, one JSON form.

A recipe (`byol_fast.config.recipes`) is a function that returns a `Config`; the command line overrides single
fields of it; the run folder keeps the result as `config.json`.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args


class ConfigError(ValueError):
    """A field of a run's configuration is out of its contract."""


def _require(ok: bool, where: str, contract: str, got: object, fix: str = "") -> None:
    if not ok:
        raise ConfigError(f"config: {where} must {contract}, got {got!r}{'; ' + fix if fix else ''}")


def _probability(where: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, where, "be a probability between 0 and 1", value)


def _positive(where: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, where, "be positive", value)


def _not_negative(where: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, where, "be zero or more", value)


def _one_of(where: str, value: str, allowed: object) -> None:
    names = get_args(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    _require(
        value in names, where, f"be one of {', '.join(names)}", value, f"did you mean {near[0]!r}?" if near else ""
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How one of the two views is drawn from an image; the defaults are view 1 of the paper (appendix B)."""

    size: int = 224
    """Height and width of the view in pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the random crop covers, smallest and largest."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the random crop, smallest and largest (drawn uniformly in the logarithm)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How the crop is resized (always antialiased)."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of the colour jitter; its four parts are applied in random order."""
    brightness: float = 0.4
    """Brightness factor is drawn from 1 - brightness .. 1 + brightness."""
    contrast: float = 0.4
    """Contrast factor is drawn from 1 - contrast .. 1 + contrast (about the mean of the grey image)."""
    saturation: float = 0.2
    """Saturation factor is drawn from 1 - saturation .. 1 + saturation."""
    hue: float = 0.1
    """Hue shift is drawn from -hue .. hue, in turns (0.5 is the opposite colour)."""
    grayscale: float = 0.2
    """Probability of dropping the colour."""
    blur: float = 1.0
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, smallest and largest."""
    blur_kernel: int = 23
    """Width of the blur's window in pixels, odd; 0 lets the window follow sigma."""
    solarize: float = 0.0
    """Probability of solarizing (inverting every value at or above the threshold)."""
    solarize_threshold: int = 128
    """Threshold of the solarization, 0..256."""

    def __post_init__(self) -> None:
        _require(1 <= self.size <= 8192, "view.size", "be 1..8192 pixels", self.size)
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            _probability(f"view.{name}", getattr(self, name))
        lo, hi = self.area
        _require(0 < lo <= hi <= 1, "view.area", "be two rising shares within (0, 1]", self.area)
        lo, hi = self.aspect
        _require(0 < lo <= hi and math.isfinite(hi), "view.aspect", "be two rising positive ratios", self.aspect)
        _one_of("view.interpolation", self.interpolation, Literal["bicubic", "bilinear"])
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
    """Where the images come from and who makes views of them."""

    root: Path | None = None
    """Images: a folder (nested, flat or class-per-folder), a list (.txt, .csv), tar shards (`train-{000..127}.tar`, a
    folder of them), Parquet files, or a `.npz` with uint8 `images` (and `labels`). A folder with `train` and `val` or
    `test` inside is split accordingly. Without a root the recipe's own data set is used where it has one."""
    builtin: Literal["none", "cifar10", "demo"] = "none"
    """Data set used when there is no root: CIFAR-10 (fetched by torchvision) or the packaged Fashion-MNIST."""
    cache: Path = Path("~/.cache/byol_fast")
    """Folder that fetched data sets, indexes of tar shards, and the images of Parquet files are kept in."""
    image_column: str = ""
    """Parquet and Hugging Face: the column of encoded images; empty: found by name and type."""
    label_column: str = ""
    """Parquet and Hugging Face: the column of class numbers or names; empty: found by name."""
    loader: Literal["auto", "dali", "torchvision", "resident"] = "auto"
    """Who decodes and crops: DALI; torchvision on CPU threads; or `resident`: arrays, kept on the device. auto: arrays
    that fit are resident on a GPU, else DALI on a GPU where it is installed, and torchvision on a CPU."""
    augment: Literal["kernels", "dali"] = "kernels"
    """Augmentation after the crop (color, grayscale, blur, solarize): our kernels, behind every loader; or `dali`, both
    views entirely by DALI's own operators, which needs the loader dali (or auto, which is DALI then)."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that DALI gives to a GPU's own decoder, where it has one; the rest takes its other units."""
    threads: int = 0
    """Decoding and augmentation threads; 0 means one per CPU core this process may use."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    on_bad: Literal["raise", "skip"] = "raise"
    """An image that cannot be read ends the run (what was learned is saved), or is passed over: listed in
    `bad_images.jsonl`, its place taken by another image."""
    max_bad: float = 0.01
    """With on_bad skip: stop when more than this share of the images (and more than 100, or half of all) is bad."""
    accept_changed: bool = False
    """When resuming, go on with other images than the run was begun with (some were added, removed or renamed)."""

    def __post_init__(self) -> None:
        _one_of("data.builtin", self.builtin, Literal["none", "cifar10", "demo"])
        _one_of("data.loader", self.loader, Literal["auto", "dali", "torchvision", "resident"])
        _one_of("data.augment", self.augment, Literal["kernels", "dali"])
        if self.augment == "dali":
            contract, fix = "be auto or dali with data.augment=dali", "set --data.augment kernels"
            _require(self.loader in ("auto", "dali"), "data.loader", contract, self.loader, fix)
        _probability("data.hw_decoder_load", self.hw_decoder_load)
        _not_negative("data.threads", self.threads)
        _positive("data.prefetch", self.prefetch)
        _one_of("data.on_bad", self.on_bad, Literal["raise", "skip"])
        _probability("data.max_bad", self.max_bad)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The encoder and the two heads."""

    encoder: str = "resnet50"
    """A torchvision classification model by name, or `timm/NAME` where timm is installed; the classifier is removed
    and the feature size found."""
    cifar_stem: bool = False
    """Replace a ResNet's stem for small images: 3x3 convolution, stride 1, padding 1, no max-pool."""
    zero_init_residual: bool = False
    """Start every residual block of a ResNet as the identity (gamma of its last norm = 0); others have none."""
    pretrained: bool = False
    """Start the encoder from torchvision's default weights (fetched from the network or torch's cache)."""
    hidden_dim: int = 4096
    """Width of the hidden layer of projector and predictor."""
    projection_dim: int = 256
    """Size of projections and predictions."""
    projector_layers: int = 2
    """Linear layers of the projector (SimSiam on ImageNet has 3)."""
    predictor_hidden_dim: int = 512
    """SimSiam only: width of the predictor's hidden layer (BYOL's is hidden_dim)."""
    last_bias: bool = False
    """BYOL only: give the last linear layer of the heads a bias (the reference has none)."""
    views: Literal["batched", "separate", "concat"] = "batched"
    """How two views pass a network: in one pass with batch-norm statistics for each view (equal to separate passes, and
    faster), in two passes, or in one pass with common statistics (another algorithm: other papers')."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, of values scaled to 0..1, that the model subtracts from its input."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations that the model divides by."""

    def __post_init__(self) -> None:
        _require(bool(self.encoder), "model.encoder", "name a model", self.encoder)
        _positive("model.hidden_dim", self.hidden_dim)
        _positive("model.projection_dim", self.projection_dim)
        _require(2 <= self.projector_layers <= 8, "model.projector_layers", "be 2..8", self.projector_layers)
        _positive("model.predictor_hidden_dim", self.predictor_hidden_dim)
        _one_of("model.views", self.views, Literal["batched", "separate", "concat"])
        for value in self.mean:
            _require(math.isfinite(value), "model.mean", "be three finite numbers", self.mean)
        for value in self.std:
            _require(math.isfinite(value) and value > 0, "model.std", "be three positive numbers", self.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate by step."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "lars"
    """LARS by the reference's rule, or torch's SGD, Adam, AdamW."""
    lr: float = 0.2
    """Base learning rate, for a batch of 256."""
    scale_lr: bool = True
    """Multiply the base learning rate by batch / 256 (off for Adam as most people use it)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to 0, or constant."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0; cut to a quarter of a run that is too short for them."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; taken as given, instead of warmup_epochs."""
    momentum: float = 0.9
    """Momentum of LARS and SGD."""
    weight_decay: float = 1.5e-6
    """Weight decay."""
    decay_1d: bool = False
    """Apply the weight decay (and LARS's adaptation) to biases and norms too; the reference does not, SimSiam does."""
    constant_predictor_lr: bool = False
    """Keep the predictor's learning rate at its peak after the warm-up, whatever the schedule (SimSiam)."""
    trust_coefficient: float = 1e-3
    """LARS trust coefficient."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, Literal["lars", "sgd", "adam", "adamw"])
        _one_of("optim.schedule", self.schedule, Literal["cosine", "constant"])
        _positive("optim.lr", self.lr)
        _not_negative("optim.warmup_epochs", self.warmup_epochs)
        if self.warmup_steps is not None:
            _not_negative("optim.warmup_steps", self.warmup_steps)
        _require(0 <= self.momentum < 1, "optim.momentum", "be within [0, 1)", self.momentum)
        _not_negative("optim.weight_decay", self.weight_decay)
        _positive("optim.trust_coefficient", self.trust_coefficient)


@dataclass(frozen=True, kw_only=True, slots=True)
class TauConfig:
    """The target network's decay: target = tau * target + (1 - tau) * online, after every optimizer step."""

    base: float = 0.996
    """First tau."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Cosine from base to 1 over the run (the paper's), or constant."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.base <= 1.0, "tau.base", "be between 0 and 1", self.base)
        _one_of("tau.schedule", self.schedule, Literal["cosine", "constant"])


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNConfig:
    """k-nearest-neighbour evaluation of the online encoder during training; labels serve here and nowhere else."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: when the training images have labels (class folders) and there are validation images."""
    val_root: Path | None = None
    """Validation images with the same classes; found by itself beside `train` as `val` or `test` in data.root."""
    every_epochs: int = 10
    """Evaluate after every so many epochs (and before the first step and after the last)."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Votes weigh exp(cosine similarity / temperature)."""
    max_train: int = 0
    """Compare with so many training images at most, evenly spaced; 0 means all."""

    def __post_init__(self) -> None:
        _one_of("knn.enabled", self.enabled, Literal["auto", "on", "off"])
        _positive("knn.every_epochs", self.every_epochs)
        _positive("knn.k", self.k)
        _positive("knn.temperature", self.temperature)
        _not_negative("knn.max_train", self.max_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """A linear classifier that learns beside the encoder, on features cut off from it; it changes nothing else."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: when the training images have labels (class folders)."""
    lr: float = 1e-3
    """Its learning rate (Adam)."""

    def __post_init__(self) -> None:
        _one_of("probe.enabled", self.enabled, Literal["auto", "on", "off"])
        _positive("probe.lr", self.lr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A pre-training run."""

    recipe: str = "custom"
    """Name of the recipe this configuration began as."""
    method: Literal["byol", "simsiam"] = "byol"
    """BYOL, or SimSiam: the online network is its own target, without a moving average."""
    name: str = ""
    """Name of the run; its folder is OUT/NAME. Empty: recipe, date and time."""
    out: Path = Path("runs")
    """Folder of run folders."""
    seed: int = 0
    """Seed of weights, shuffling and augmentation."""
    epochs: int = 100
    """Passes over the training images."""
    steps: int = 0
    """Optimizer steps in all; 0 means as the epochs say."""
    batch_size: int = 256
    """Images that a process takes at a time (each gives two views)."""
    grad_accum_steps: int = 1
    """Batches whose gradients are averaged for one optimizer step; the target moves once. The learning rate scales
    with batch_size * grad_accum_steps * processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """Arithmetic of the networks (weights stay fp32); auto: bf16 on GPUs and CPUs with bf16 instructions. fp16 scales
    the loss by itself; tf32 is fp32 with TF32 products on a GPU."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How a step runs: eager, compiled by torch.compile, or compiled and captured whole into a CUDA graph. auto picks,
    and the run says which and why."""
    max_autotune: bool = False
    """Where the step is compiled: let inductor time several variants of each kernel (max-autotune). For a ResNet-50
    these are hundreds, tuned one after the other: an estimated 25 to 60 minutes of silence before the first step."""
    cudnn_benchmark: bool = False
    """On a GPU: let cuDNN time its algorithms for each convolution in the first steps and keep the fastest
    (torch.backends.cudnn.benchmark). Shapes never change within a run."""
    activation_checkpointing: bool = False
    """Keep only the encoder's block boundaries for the backward pass and compute the rest again: less memory, about a
    third more time."""
    sync_batchnorm: bool = True
    """With several processes, take batch-norm statistics over all of them (the reference does)."""
    max_skipped_steps: int = 10
    """Stop after so many steps in a row whose loss or gradient is not finite; each of them is skipped and counted."""
    channels_last: bool = True
    """Keep images and filters in NHWC memory."""
    log_every: int = 10
    """Write the records of so many steps at a time to metrics.jsonl (every step gets one)."""
    checkpoint_every: int = 0
    """Save a checkpoint after so many steps; 0 means after every epoch, or as many whole epochs as make 100 steps."""
    keep_checkpoints: int = 3
    """Checkpoints kept, besides the one with the best kNN accuracy; older ones are deleted."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into the run folder's `tb`."""
    timeout_minutes: float = 30.0
    """With several processes: how long one waits for the others before the run fails."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and who loads them."""
    view1: ViewConfig = field(default_factory=ViewConfig)
    """Augmentation of the first view."""
    view2: ViewConfig = field(default_factory=lambda: ViewConfig(blur=0.1, solarize=0.2))
    """Augmentation of the second view."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and heads."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    tau: TauConfig = field(default_factory=TauConfig)
    """Decay of the target network."""
    knn: KNNConfig = field(default_factory=KNNConfig)
    """Evaluation during training."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Classification during training."""

    def __post_init__(self) -> None:
        _require("/" not in self.name and self.name not in {".", ".."}, "name", "be a plain folder name", self.name)
        _require(0 <= self.seed < 2**31, "seed", "be 0..2147483647", self.seed)
        _positive("epochs", self.epochs)
        _not_negative("steps", self.steps)
        _require(self.batch_size >= 2, "batch_size", "be 2 or more", self.batch_size, "batch normalisation needs 2")
        _one_of("device", self.device, Literal["auto", "cpu", "cuda"])
        _one_of("method", self.method, Literal["byol", "simsiam"])
        _positive("grad_accum_steps", self.grad_accum_steps)
        _one_of("precision", self.precision, Literal["auto", "bf16", "fp16", "tf32", "fp32"])
        _one_of("mode", self.mode, Literal["auto", "eager", "compile", "graph"])
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
