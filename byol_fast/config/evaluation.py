"""Settings of evaluations, the options of `byol-fast eval`: frozen dataclasses with validated fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from byol_fast.config.schema import ConfigError


def _require(ok: bool, field: str, contract: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"eval: {field} must {contract}, got {got!r}")


def _require_positive(field: str, values: Sequence[float]) -> None:
    ok = len(values) > 0 and all(math.isfinite(value) and value > 0 for value in values)
    _require(ok, field, "be one or more positive numbers", values)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Settings of all protocols."""

    baselines: bool = False
    """Evaluate baselines as well: the untrained encoder with calibrated norms, and raw pixels; for fine-tuning, the
    untrained encoder, which is supervised training from scratch."""
    max_train: int = 0
    """Maximum number of training images, evenly spaced; 0: all."""
    max_test: int = 0
    """Maximum number of test images, evenly spaced; 0: all."""
    seed: int = 0
    """Seed of splits, crops and initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision of the encoder, as in training; classifiers on frozen features are fp32."""
    threads: int = 0
    """Decoding threads; 0: one per CPU core available to this process."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """raise: stop at an image that cannot be read; skip: leave it out."""

    def __post_init__(self) -> None:
        for name in ("max_train", "max_test", "threads"):
            value = getattr(self, name)
            _require(value >= 0, name, "be zero or more", value)
        _require(0 <= self.seed < 2**31, "seed", "be 0..2147483647", self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class KNNSettings(EvalSettings):
    """Cosine nearest neighbors that vote with weights exp(similarity / temperature)."""

    k: tuple[int, ...] = ()
    """Numbers of neighbors. The first is the result, the others are points of a curve. Default: knn.k of the run, then
    1, 5, 20, 100 and 200."""
    temperature: float | None = None
    """Temperature of the votes. Default: knn.temperature of the run, else 0.07 (lightly's benchmarks: 0.1)."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        _require(all(k >= 1 for k in self.k), "k", "be positive numbers", self.k)
        ok = self.temperature is None or (math.isfinite(self.temperature) and self.temperature > 0)
        _require(ok, "temperature", "be positive", self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings(EvalSettings):
    """Linear classifier on the frozen encoder."""

    protocol: Literal["fast", "reference"] = "fast"
    """fast: one pass over center crops; multinomial logistic regression on the features by L-BFGS, its regularization
    selected on a held-out part of the training images, then fitted on all (the paper's protocol for transfer).
    reference: SGD on random crops and flips, test on center crops (the paper's protocol for ImageNet)."""
    held_out: float = 0.1
    """Share of each class's training images that is held out for model selection; 0 with a single candidate."""
    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    """fast: candidates of the regularization, l2 / 2 times the squared weights, added to the mean cross-entropy."""
    flip: bool = False
    """fast: train on the features of the mirrored images as well."""
    lr: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1, 0.05)
    """reference: candidates of the learning rate for a batch of 256; all are trained in the same pass."""
    epochs: int = 80
    """reference: passes over the training images."""
    batch_size: int = 1024
    """reference: images per step; the learning rate scales with batch_size / 256."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        _require(self.protocol in ("fast", "reference"), "protocol", "be fast or reference", self.protocol)
        _require(0 < self.held_out <= 0.5, "held_out", "be above 0, at most 0.5", self.held_out)
        ok = len(self.l2) > 0 and all(math.isfinite(value) and value >= 0 for value in self.l2)
        _require(ok, "l2", "be one or more numbers of zero or more", self.l2)
        _require_positive("lr", self.lr)
        _require(self.epochs >= 1, "epochs", "be 1 or more", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "be 1 or more", self.batch_size)
        fields_of = {"fast": ("l2", "flip"), "reference": ("lr", "epochs", "batch_size")}
        other = "reference" if self.protocol == "fast" else "fast"
        for name in fields_of[other]:
            default = next(f.default for f in fields(self) if f.name == name)
            contract = f"be left at its default with protocol {self.protocol}, it belongs to {other}"
            _require(getattr(self, name) == default, name, contract, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings(EvalSettings):
    """Fine-tuning of the whole network on a share of the labels: SGD with Nesterov momentum, crops and flips."""

    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of each class's labels, one evaluation for each; a smaller share is a subset of a larger one."""
    lr: tuple[float, ...] = (0.05,)
    """Candidates of the learning rate for a batch of 256 (the paper's: 0.1 0.05 0.02 0.01 0.005)."""
    epochs: tuple[int, ...] = (30,)
    """Candidates of the number of epochs over the labeled images (the paper's: 30 50)."""
    held_out: float = 0.2
    """Share of the labeled images that is held out for model selection; the best candidate is then trained again on all
    labeled images. 0 with a single candidate. The network of the last epoch is evaluated."""
    batch_size: int = 256
    """Images per step (the paper's: 1024); the learning rate scales with batch_size / 256."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        ok = len(self.labels) > 0 and all(0 < share <= 1 for share in self.labels)
        _require(ok, "labels", "be one or more shares, above 0, at most 1", self.labels)
        _require_positive("lr", self.lr)
        _require(len(self.epochs) > 0 and min(self.epochs) >= 1, "epochs", "be positive numbers", self.epochs)
        _require(0 < self.held_out <= 0.5, "held_out", "be above 0, at most 0.5", self.held_out)
        _require(self.batch_size >= 2, "batch_size", "be 2 or more", self.batch_size)
