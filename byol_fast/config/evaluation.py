"""Settings of evaluations, the options of `byol-fast eval`: frozen dataclasses with validated fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from byol_fast.config.fields import (
    BatchSize,
    Count,
    Device,
    LearningRate,
    Neighbors,
    OnCorrupt,
    Range,
    Seed,
    Temperature,
    Threads,
    TrainBatchSize,
    check_fields,
    require,
)

Epochs = Annotated[int, Range(1, 100_000)]
HeldOut = Annotated[float, Range(1e-6, 0.5)]
Penalty = Annotated[float, Range(0, 1e10)]
Shots = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Settings of all protocols."""

    baselines: bool = False
    """Evaluate baselines as well: the untrained encoder with calibrated norms, and raw pixels; for fine-tuning, the
    untrained encoder, which is supervised training from scratch."""
    max_test: Count = 0
    """Maximum number of test images, evenly spaced; 0: all."""
    seed: Seed = 0
    """Seed of splits, draws, crops and initial weights."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision of the encoder, as in training; classifiers on frozen features are fp32."""
    threads: Threads = 0
    """Decoding threads; 0: one per CPU core available to this process."""
    on_corrupt: OnCorrupt = "raise"
    """raise: stop at an image that cannot be read; skip: leave it out."""

    def __post_init__(self) -> None:
        check_fields(self, "eval: ")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierSettings(EvalSettings):
    """Settings of the protocols that classify test images with the help of labeled training images."""

    max_train: Count = 0
    """Maximum number of training images, evenly spaced; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNSettings(ClassifierSettings):
    """Cosine nearest neighbors that vote with weights exp(similarity / temperature)."""

    k: tuple[Neighbors, ...] = ()
    """Numbers of neighbors. The first is the result, the others are points of a curve. Default: knn.k of the run, then
    1, 5, 20, 100 and 200."""
    temperature: Temperature | None = None
    """Temperature of the votes. Default: knn.temperature of the run, else 0.07 (lightly's benchmarks: 0.1)."""
    shots: tuple[Shots, ...] = ()
    """Numbers of training images per class. For each, the mean accuracy over 20 random draws of so few images is
    reported; the nearest of them vote, as many as there are of a class, but at most the first k. Default: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings(ClassifierSettings):
    """Linear classifier on the frozen encoder."""

    protocol: Literal["fast", "reference"] = "fast"
    """fast: one pass over center crops; multinomial logistic regression on the features by L-BFGS, its regularization
    selected on a held-out part of the training images, then fitted on all (the paper's protocol for transfer).
    reference: SGD on random crops and flips, test on center crops (the paper's protocol for ImageNet)."""
    held_out: HeldOut = 0.1
    """Share of each class's training images that is held out for model selection; 0 with a single candidate."""
    l2: tuple[Penalty, ...] = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    """fast: candidates of the regularization, l2 / 2 times the squared weights, added to the mean cross-entropy."""
    flip: bool = False
    """fast: train on the features of the mirrored images as well."""
    lr: tuple[LearningRate, ...] = (0.4, 0.3, 0.2, 0.1, 0.05)
    """reference: candidates of the learning rate for a batch of 256; all are trained in the same pass."""
    epochs: Epochs = 80
    """reference: passes over the training images."""
    batch_size: BatchSize = 1024
    """reference: images per step; the learning rate scales with batch_size / 256."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        for name in ("l2", "lr"):
            require(len(getattr(self, name)) > 0, f"eval: {name}", "be one or more values", ())
        fields_of = {"fast": ("l2", "flip"), "reference": ("lr", "epochs", "batch_size")}
        other = "reference" if self.protocol == "fast" else "fast"
        for name in fields_of[other]:
            default = next(f.default for f in fields(self) if f.name == name)
            contract = f"be left at its default with protocol {self.protocol}, it belongs to {other}"
            require(getattr(self, name) == default, f"eval: {name}", contract, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings(ClassifierSettings):
    """Fine-tuning of the whole network on a share of the labels: SGD with Nesterov momentum, crops and flips."""

    labels: tuple[Annotated[float, Range(1e-6, 1)], ...] = (0.01, 0.1, 1.0)
    """Shares of each class's labels, one evaluation for each; a smaller share is a subset of a larger one."""
    lr: tuple[LearningRate, ...] = (0.05,)
    """Candidates of the learning rate for a batch of 256 (the paper's: 0.1 0.05 0.02 0.01 0.005)."""
    epochs: tuple[Epochs, ...] = (30,)
    """Candidates of the number of epochs over the labeled images (the paper's: 30 50)."""
    held_out: HeldOut = 0.2
    """Share of the labeled images that is held out for model selection; the best candidate is then trained again on all
    labeled images. 0 with a single candidate. The network of the last epoch is evaluated."""
    batch_size: TrainBatchSize = 256
    """Images per step (the paper's: 1024); the learning rate scales with batch_size / 256."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        for name in ("labels", "lr", "epochs"):
            require(len(getattr(self, name)) > 0, f"eval: {name}", "be one or more values", ())


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSettings(EvalSettings):
    """Retrieval of the images of a query's class among all other test images, by cosine similarity."""
