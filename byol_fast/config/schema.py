"""Configuration of a run: frozen dataclasses with validated fields.

A recipe (`byol_fast.config.recipes`) is a function that returns a `Config`; the command line overrides single
fields of it; the run folder keeps the result as `config.json`. The docstrings of the fields are the texts of `--help`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from byol_fast.config.fields import (
    ChannelMean,
    ChannelStd,
    Count,
    Device,
    Epochs,
    GradAccumSteps,
    LearningRate,
    Loader,
    Neighbors,
    OnCorrupt,
    Precision,
    Probability,
    Range,
    Schedule,
    Seed,
    Temperature,
    Threads,
    TrackerName,
    TrainBatchSize,
    ViewBatching,
    Width,
    check_fields,
    expand_home,
    require,
)
from byol_fast.config.resnets import LIGHTLY_RESNET
from byol_fast.config.views import ViewConfig

MAX_PIXELS = 2**33
"""Largest number of pixels of all views in the batches that are in memory at a time: 24 GiB."""
MAX_WEIGHTS = 2**28
"""Largest number of weights in a layer of the heads: 1 GiB."""


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
    loader: Loader = "auto"
    """Data loader: `dali`; `threaded` (CPU threads with torchvision's decoder); or `device_cache` (arrays that are kept
    on the device). auto: on a GPU device_cache for arrays that fit, otherwise dali if it is installed; on a CPU
    threaded."""
    augment: Literal["kernels", "dali"] = "kernels"
    """Augmentation after the crop (color, grayscale, blur, solarize): our kernels, with every loader; or `dali`: all
    views entirely by DALI's own operators, which requires loader dali (or auto, which is dali then)."""
    hw_decoder_load: Probability = 0.65
    """Fraction of the JPEGs that DALI decodes on a GPU's hardware decoder, if it has one."""
    threads: Threads = 0
    """Decoding and augmentation threads; 0: one per core of the process; with 1, a dataset is read item by item."""
    prefetch: Annotated[int, Range(1, 64)] = 2
    """Batches prepared ahead of the step."""
    on_corrupt: OnCorrupt = "raise"
    """Images that cannot be read: `raise` ends the run (progress is saved); `skip` replaces them by other images and
    lists them in `corrupt_images.jsonl`. A damaged tar shard: `raise` is an error at the start; `skip` uses the images
    in front of the damage."""
    max_corrupt_fraction: Probability = 0.01
    """With on_corrupt skip: stop if more than this fraction of the images (and more than 100, or half of all) is
    corrupt."""
    accept_changed: bool = False
    """Resume although images were added, removed or renamed since the run was started; it is then not bit-exact."""

    def __post_init__(self) -> None:
        check_fields(self, "config: data.")
        if self.augment == "dali":
            contract, fix = "be auto or dali with data.augment=dali", "set --data.augment kernels"
            require(self.loader in ("auto", "dali"), "config: data.loader", contract, self.loader, fix)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Encoder and heads."""

    encoder: str = "resnet50"
    """Torchvision classification model, or `timm/NAME` if timm is installed; its classifier is removed."""
    cifar_stem: bool = False
    """ResNets of torchvision: replace the stem for small images by a 3x3 convolution with stride 1 and padding 1,
    without max-pool. True for `resnet18_lightly`, which has no other."""
    zero_init_residual: bool = False
    """ResNets of torchvision: initialize every residual block as the identity (weight of its last norm = 0)."""
    hidden_dim: Width = 4096
    """Width of the hidden layers of projector and predictor (with SimSiam of the projector)."""
    projection_dim: Width = 256
    """Size of projections and predictions."""
    projector_layers: Annotated[int, Range(2, 8)] = 2
    """Linear layers of the projector (SimSiam on ImageNet has 3)."""
    predictor_hidden_dim: Width = 512
    """SimSiam only: width of the predictor's hidden layer (BYOL's is hidden_dim)."""
    hidden_bias: bool = True
    """BYOL only: give the linear layers before a batch norm in the heads a bias (lightly's have none)."""
    last_bias: bool = False
    """BYOL only: give the last linear layer of the heads a bias (the reference has none)."""
    view_batching: ViewBatching = "batched"
    """Forward passes of the views: one for all views of a size, with batch-norm statistics of each view (`batched`:
    equal to separate passes, and faster), one for each view (`separate`), or one for the two views with common
    statistics (`concat`: another algorithm)."""
    mean: tuple[ChannelMean, ChannelMean, ChannelMean] = (0.485, 0.456, 0.406)
    """Channel means, of values from 0 to 1, for the normalization of the input."""
    std: tuple[ChannelStd, ChannelStd, ChannelStd] = (0.229, 0.224, 0.225)
    """Channel standard deviations, of values from 0 to 1, for the normalization of the input."""

    def __post_init__(self) -> None:
        own = "train a module of your own in a loop, with byol_fast.BYOL(module)"
        require(isinstance(self.encoder, str), "config: model.encoder", "be a model's name", self.encoder, own)
        check_fields(self, "config: model.")
        require(bool(self.encoder), "config: model.encoder", "name a model", self.encoder)
        if self.encoder == LIGHTLY_RESNET:
            object.__setattr__(self, "cifar_stem", True)
        hidden, out = self.hidden_dim, self.projection_dim
        inner = hidden if self.projector_layers > 2 else 1
        contract = f"leave every layer of the heads at most {MAX_WEIGHTS:,} weights with projection_dim {out:,}"
        require(hidden * max(out, inner) <= MAX_WEIGHTS, "config: model.hidden_dim", contract, hidden)
        contract = f"leave the predictor at most {MAX_WEIGHTS:,} weights a layer with projection_dim {out:,}"
        width = self.predictor_hidden_dim
        require(width * out <= MAX_WEIGHTS, "config: model.predictor_hidden_dim", contract, width)


METHOD_OPTIONS = {"hidden_bias": "byol", "last_bias": "byol", "predictor_hidden_dim": "simsiam"}
"""Fields of `ModelConfig` that one method alone uses, and the method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "lars"
    """LARS as in the reference implementation, or torch's SGD, Adam, AdamW."""
    lr: LearningRate = 0.2
    """Base learning rate, for a batch of 256."""
    scale_lr: bool = True
    """Multiply the base learning rate by batch size / 256; usually off for Adam."""
    schedule: Schedule = "cosine"
    """Learning rate after the warmup: cosine to 0, or constant."""
    lr_interval: Literal["step", "epoch"] = "step"
    """Take the cosine at every step, or once per epoch, at its first step; the warmup is by step."""
    warmup_epochs: Annotated[float, Range(0, 1_000_000)] = 10.0
    """Epochs of linear warmup from 0; at most a quarter of the run."""
    warmup_steps: Count | None = None
    """Steps of linear warmup, used as given; replaces warmup_epochs."""
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    """Momentum of LARS and SGD."""
    weight_decay: Annotated[float, Range(0, 100)] = 1.5e-6
    """Weight decay."""
    decay_1d: bool = False
    """Apply weight decay and LARS's adaptation to biases and norms, too; the reference does not, SimSiam does."""
    constant_predictor_lr: bool = False
    """Keep the predictor's learning rate constant after the warmup, with any schedule (SimSiam)."""
    trust_coefficient: Annotated[float, Range(1e-9, 1000)] = 1e-3
    """LARS trust coefficient."""

    def __post_init__(self) -> None:
        check_fields(self, "config: optim.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TauConfig:
    """EMA of the target network: target = tau * target + (1 - tau) * online, after every optimizer step."""

    base: Probability = 0.996
    """Tau at the first step."""
    schedule: Schedule = "cosine"
    """Cosine from base to 1 over the run (as in the paper), or constant."""

    def __post_init__(self) -> None:
        check_fields(self, "config: tau.")


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNConfig:
    """k-nearest-neighbor evaluation of the online encoder during training; labels are not used for training."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: if the training images have labels (class folders) and there are validation images."""
    val_root: Path | None = None
    """Validation images with the same classes; empty: `val` or `test` beside `train` in data.root."""
    every_epochs: Epochs = 10
    """Epochs between evaluations; also before the first step and after the last."""
    k: Neighbors = 20
    """Number of neighbors; at most the number of training images to compare with."""
    temperature: Temperature = 0.07
    """Temperature of the votes, which are weighted by exp(cosine similarity / temperature)."""
    max_train: Count = 5000
    """Largest number of training images to compare with, evenly spaced within the classes; 0: all."""
    max_val: Count = 2000
    """Largest number of validation images, evenly spaced within the classes, the same at every evaluation; 0: all."""
    full_at_end: bool = False
    """Evaluate once more on all images after the last step (`knn_full_top1`), to compare with published numbers."""

    def __post_init__(self) -> None:
        check_fields(self, "config: knn.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Linear classifier trained online on detached features of the encoder; it does not change the training."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: if the training images have labels (class folders)."""
    lr: LearningRate = 1e-3
    """Learning rate of the classifier (Adam)."""

    def __post_init__(self) -> None:
        check_fields(self, "config: probe.")


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
    seed: Seed = 0
    """Seed of weights, shuffling and augmentation."""
    init_from: str = ""
    """Initial weights of the encoder: a run folder, an exported encoder, a file of weights (.safetensors, .pt, .pth,
    .pth.tar, .ckpt, .torch), or `torchvision` or `timm` for that package's pretrained weights. Empty: random ones."""
    init_partial: bool = False
    """Start although init_from has less than 90 % of the encoder's parameters, or is deeper; the others are random."""
    init_sha256: str = ""
    """SHA-256 of the file of init_from (of torchvision's or timm's tensors). Empty: any; the run fills it in."""
    epochs: Epochs = 100
    """Passes over the training images."""
    steps: Count = 0
    """Total number of optimizer steps; 0: determined by epochs."""
    extend: Path | None = None
    """Finished run that this one goes on from, in a folder of its own. Set by `train --extend RUN`."""
    extended_at: Count = 0
    """Optimizer steps of that run; epochs and steps of this one include them. Set by `train --extend RUN`."""
    batch_size: TrainBatchSize = 256
    """Images per batch and process (each gives two views, and num_local_views more)."""
    grad_accum_steps: GradAccumSteps = 1
    """Batches whose gradients are averaged for one optimizer step and one target update. The learning rate scales with
    batch_size * grad_accum_steps * processes."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    precision: Precision = "auto"
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
    memory_check: bool = True
    """Estimate the memory before the networks are built, and refuse a run that needs over 115 % of what is available.
    Tensors are counted, in eager mode."""
    sync_batchnorm: bool = True
    """With several processes: compute batch-norm statistics over all of them (as the reference does)."""
    max_skipped_steps: Annotated[int, Range(1, 1_000_000_000)] = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; each is skipped and counted."""
    channels_last: bool = True
    """Use the channels_last (NHWC) memory format."""
    log_every: Annotated[int, Range(1, 10_000)] = 10
    """Steps between writes to metrics.jsonl, which has a record of every step. Without a terminal, the log shows one of
    these steps, at most every ten seconds."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: an epoch, or as many whole epochs as make 100 steps."""
    keep_checkpoints: Annotated[int, Range(1, 1_000_000)] = 3
    """Number of checkpoints to keep besides the one with the best kNN accuracy; older ones are deleted."""
    log: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get the metrics, too: `tensorboard` (files in `tb` of the run folder), `wandb`, `mlflow`; several
    are possible, `--log` without a name is none. Server and project: by the tracker's own environment variables."""
    timeout_minutes: Annotated[float, Range(0.1, 100_000)] = 30.0
    """With several processes: timeout of collective operations, in minutes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and data loader."""
    view1: ViewConfig = field(default_factory=ViewConfig)
    """Augmentation of the first view."""
    view2: ViewConfig = field(default_factory=lambda: ViewConfig(blur_p=0.1, solarize_p=0.2))
    """Augmentation of the second view."""
    num_local_views: Annotated[int, Range(0, 16)] = 0
    """Further, small views of an image (multi-crop, as in SwAV and DINO). The online network alone sees them; from each
    it predicts the target's projections of both global views."""
    # Size, crop and blur of DINO (arXiv 2104.14294, appendix), with BYOL's jitter.
    local_view: ViewConfig = field(default_factory=lambda: ViewConfig(size=96, scale=(0.05, 0.25), blur_p=0.5))
    """Augmentation of the local views."""
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
        check_fields(self, "config: ")
        object.__setattr__(self, "out", expand_home(self.out))
        is_name = "/" not in self.name and self.name not in {".", ".."}
        require(is_name, "config: name", "be a plain folder name", self.name)
        self._check_init()
        fix = "name each tracker once"
        require(len(set(self.log)) == len(self.log), "config: log", "have no repeated names", self.log, fix)
        contract = "be above 0 with extend, and 0 without"
        fix = "use `byol-fast train --extend RUN --epochs N`, which sets both"
        require(
            (self.extend is None) == (self.extended_at == 0), "config: extended_at", contract, self.extended_at, fix
        )
        for option, method in METHOD_OPTIONS.items():
            value, default = getattr(self.model, option), ModelConfig.__dataclass_fields__[option].default
            contract = f"be its default with method {self.method}, which has no such option"
            fix = f"set it to {default!r}"
            require(self.method == method or value == default, f"config: model.{option}", contract, value, fix)
        self._check_views()

    @property
    def before_training(self) -> str:
        """Adjective for the encoder before the first step, for messages: untrained, or initial with `init_from`."""
        return "initial" if self.init_from else "untrained"

    def _check_init(self) -> None:
        """Check the options of the initial weights."""
        where, contract, fix = "config: init_partial", "be False without init_from", "name the weights"
        require(bool(self.init_from) or not self.init_partial, where, contract, self.init_partial, fix)
        where, contract = "config: init_sha256", "be empty without init_from"
        require(bool(self.init_from) or not self.init_sha256, where, contract, self.init_sha256, fix)
        is_digest = re.fullmatch("[0-9a-f]{64}", self.init_sha256 or "0" * 64) is not None
        require(is_digest, where, "be 64 hexadecimal digits in lower case", self.init_sha256, "see sha256sum FILE")

    @property
    def view_configs(self) -> tuple[ViewConfig, ...]:
        """Configurations of all views of an image: two global ones, then the local ones."""
        return (self.view1, self.view2, *[self.local_view] * self.num_local_views)

    def _check_views(self) -> None:
        """Check the views against each other, the method and the memory."""
        sizes, k = [view.size for view in self.view_configs], self.num_local_views
        can_differ, fix = self.model.view_batching != "concat", "set model.view_batching to batched"
        contract = f"equal view1.size ({sizes[0]}) with model.view_batching concat"
        require(can_differ or sizes[0] == sizes[1], "config: view2.size", contract, sizes[1], fix)
        where = "config: num_local_views"
        require(k == 0 or self.method == "byol", where, "be 0 with method simsiam, whose loss is of two views", k)
        contract = "be 0 with model.view_batching concat, whose statistics are of two views"
        require(k == 0 or can_differ, where, contract, k, fix)
        contract = f"be at most the size of the global views, {min(sizes[:2])}, with num_local_views {k}"
        size, fix = self.local_view.size, "make it smaller; usual is about half of theirs"
        require(k == 0 or size <= min(sizes[:2]), "config: local_view.size", contract, size, fix)

        batches = self.data.prefetch + 1 + self.grad_accum_steps
        pixels = sum(size**2 for size in sizes)
        require(
            batches * self.batch_size * pixels <= MAX_PIXELS,
            "config: batch_size",
            f"leave the views in memory (data.prefetch + grad_accum_steps + 1 = {batches:,} batches) at most "
            f"{MAX_PIXELS:,} pixels, {MAX_PIXELS // (batches * pixels):,} images a batch",
            self.batch_size,
            "make the batch, the views or these numbers smaller",
        )
