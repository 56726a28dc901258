"""Evaluation by fine-tuning: the whole network is trained further on labeled images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.config.evaluation import FinetuneSettings
from byol_fast.data import ImageSource
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.linear import nesterov_sgd, truncated_normal
from byol_fast.evaluate.metrics import Scores, accuracy, predict, score, top_classes
from byol_fast.evaluate.results import Baseline, Evaluation
from byol_fast.evaluate.runner import ClassifierRun, EvalContext, OnResult
from byol_fast.evaluate.splits import balanced_subset, train_val_split
from byol_fast.evaluate.supervised_loader import SupervisedLoader, generator
from byol_fast.models.encoders import feature_dim
from byol_fast.optim.schedules import lr_at
from byol_fast.utils.progress import Progress

MIN_STEPS_PER_EPOCH = 12
"""As in the paper's fine-tuning on 1 % of ImageNet; with fewer images, batches are smaller."""
MIN_BATCH_SIZE = 16


class DivergedError(ValueError):
    """A loss that is not finite."""


class Classifier(nn.Module):
    """An encoder followed by a linear layer."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, C]` of normalized images `[B, 3, S, S]`."""
        logits: Tensor = self.head(self.encoder(x).flatten(1))
        return logits


@dataclass(frozen=True, slots=True, eq=False)
class FinetuneResult:
    """A fine-tuned network."""

    network: Classifier
    """Weights of the last epoch, on the device, in eval mode."""
    history: tuple[float, ...]
    """Accuracy on the random crops of each epoch, during training."""


class Trial(NamedTuple):
    """Result of one candidate of a grid search."""

    lr: float
    epochs: int
    accuracy: float
    """On held-out images; 0 if the training diverged."""


def evaluate_finetune(
    encoder: str | Path | PretrainedEncoder,
    train: object = None,
    test: object = None,
    *,
    settings: FinetuneSettings | None = None,
    output_dir: Path | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    **changes: Any,
) -> list[Evaluation]:
    """Evaluate an encoder by fine-tuning the whole network on 1 %, 10 % and all of the labels (default).

    SGD with Nesterov momentum, cosine decay, random crops and flips; the network of the last epoch is evaluated. With
    several candidates of `lr` and `epochs`, the best on a held-out part of the labeled images is selected and trained
    again on all of them (BYOL, arXiv 2006.07733, appendix on semi-supervised training).

    Args:
        encoder: as for `evaluate_knn`.
        train: as for `evaluate_knn`.
        test: as for `evaluate_knn`.
        settings: as for `evaluate_knn`.
        output_dir: folder that the records `finetune_10pct.json`, ... are written to; None: none is written.
        progress: as for `evaluate_knn`.
        on_result: as for `evaluate_knn`.
        **changes: fields of the settings to replace.

    Returns:
        One evaluation per share of the labels.

    Raises:
        ValueError: the images or settings do not fit.
        DivergedError: the loss is not finite with any candidate.
        ConfigError: the folder cannot be written.
    """
    run = ClassifierRun(
        encoder,
        train,
        test,
        settings or FinetuneSettings(),
        changes,
        output_dir=output_dir,
        progress=progress,
        on_result=on_result,
    )
    return [_evaluate_share(run, share) for share in run.settings.labels]


def _evaluate_share(run: ClassifierRun[FinetuneSettings], share: float) -> Evaluation:
    """Fine-tune on a share of the labels; the baseline is supervised training from scratch."""
    start_time = time.monotonic()
    s, images = run.settings, run.images
    labeled = images.train.subset(balanced_subset(np.asarray(images.train.labels), share, seed=s.seed))

    scores, facts, curve = _evaluate_network(run, "this encoder", run.pretrained.encoder, labeled)
    baselines = []
    if s.baselines:
        untrained = run.pretrained.untrained(s.seed)
        scratch_scores, scratch_facts, _ = _evaluate_network(run, "from scratch", untrained, labeled)
        baselines.append(Baseline.of("from scratch", scratch_scores))
        facts["from_scratch"] = scratch_facts
    return run.finish(
        f"finetune_{100 * share:g}pct",
        scores,
        chosen={"labels": share} | facts,
        baselines=baselines,
        curve=curve,
        curve_label="epoch (random crops, during training)",
        num_train=len(labeled),
        start_time=start_time,
    )


def _evaluate_network(
    run: ClassifierRun[FinetuneSettings], name: str, encoder: nn.Module, labeled: ImageSource
) -> tuple[Scores, dict[str, Any], list[tuple[float, float]]]:
    """Test scores, hyperparameters and training curve of one network."""
    s, context, pretrained = run.settings, run.context, run.pretrained
    description = f"{name}, {len(labeled)} labels"
    batch_size = batch_size_for(len(labeled), s.batch_size)
    candidates = [(lr, epochs) for lr in sorted(set(s.lr)) for epochs in sorted(set(s.epochs))]

    # --- model selection
    (lr, epochs), trials, num_held_out = candidates[0], [], 0
    if len(candidates) > 1:
        parts = train_val_split(np.asarray(labeled.labels), s.held_out, seed=s.seed)
        train, val = (labeled.subset(part) for part in parts)
        num_held_out = len(val)
        trials = grid_search(
            pretrained,
            encoder,
            train,
            val,
            context,
            candidates=candidates,
            batch_size=batch_size,
            seed=s.seed,
            description=description,
        )
        lr, epochs, _ = max(trials, key=lambda trial: trial.accuracy)

    # --- training on all labeled images, and test
    result = finetune(
        pretrained,
        encoder,
        labeled,
        context,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=s.seed,
        description=description,
    )
    ranking, y = context.features(
        pretrained, result.network, run.images.test, f"{description}: test images", transform=top_classes
    )
    facts: dict[str, Any] = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "num_held_out": num_held_out}
    facts["tried"] = [{"lr": t.lr, "epochs": t.epochs, "top1_held_out": t.accuracy} for t in trials]
    curve = [(float(epoch), top1) for epoch, top1 in enumerate(result.history, 1)]
    return score(ranking, y, run.images.classes), facts, curve


def batch_size_for(num_images: int, requested: int) -> int:
    """The requested batch size, reduced for at least 12 steps per epoch, but not below 16."""
    return min(requested, max(num_images // MIN_STEPS_PER_EPOCH, MIN_BATCH_SIZE), num_images)


def grid_search(
    pretrained: PretrainedEncoder,
    encoder: nn.Module,
    train: ImageSource,
    val: ImageSource,
    context: EvalContext,
    *,
    candidates: Sequence[tuple[float, int]],
    batch_size: int,
    seed: int,
    description: str,
) -> list[Trial]:
    """Fine-tune once per candidate and evaluate on held-out images.

    Args:
        pretrained: as for `finetune`.
        encoder: as for `finetune`.
        train: labeled images to train on.
        val: labeled images to evaluate on; never test images.
        context: as for `finetune`.
        candidates: learning rates and epochs.
        batch_size: as for `finetune`.
        seed: as for `finetune`.
        description: as for `finetune`.

    Raises:
        DivergedError: the loss is not finite with any candidate.
    """
    trials: list[Trial] = []
    num_diverged = 0
    for lr, epochs in candidates:
        name = f"{description}, lr {lr:g}, {epochs} epochs"
        try:
            result = finetune(
                pretrained,
                encoder,
                train,
                context,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                description=name,
            )
        except DivergedError as error:
            context.progress.print(str(error))
            trials.append(Trial(lr, epochs, 0.0))
            num_diverged += 1
            continue
        predictions, y = context.features(pretrained, result.network, val, "held-out images", transform=predict)
        trials.append(Trial(lr, epochs, accuracy(predictions, y)))
        context.progress.print(f"{name}: {trials[-1].accuracy:.1%} of {len(y)} held-out images")
    if num_diverged == len(trials):
        raise DivergedError(
            f"finetune: the loss must be finite, it is not for any of {len(trials)} candidates; use a smaller --lr"
        )
    return trials


def finetune(
    pretrained: PretrainedEncoder,
    encoder: nn.Module,
    source: ImageSource,
    context: EvalContext,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    description: str,
) -> FinetuneResult:
    """Train an encoder and a new linear classifier on labeled images.

    SGD with Nesterov momentum 0.9, learning rate `lr * batch_size / 256` with cosine decay to 0, no weight decay,
    random crops and flips, BN in train mode (BYOL, arXiv 2006.07733, appendix C, and its `eval_experiment.py`).

    Args:
        pretrained: its input format is used.
        encoder: initial weights; not modified.
        source: labeled images.
        context: device and precision.
        lr: peak learning rate for a batch of 256.
        epochs: passes over the images.
        batch_size: images per step.
        seed: of the classifier's initial weights, the order of the images and the crops.
        description: text of the progress bar.

    Raises:
        DivergedError: the loss is not finite.
    """
    # --- network, data, optimizer
    dim, num_classes = feature_dim(encoder, pretrained.preprocessing.crop), len(source.classes)
    context.check_memory(3 * (dim + batch_size) * num_classes, num_classes)
    head = _initial_head(dim, num_classes, generator(seed))
    network = context.to_device(Classifier(encoder, head)).train().requires_grad_()
    assert isinstance(network, Classifier)
    normalize = pretrained.normalize.to(context.device)
    loader = SupervisedLoader(pretrained, source, context, batch_size=batch_size, seed=seed)
    total_steps = epochs * loader.batches_per_epoch
    optimizer = nesterov_sgd(network.parameters())

    # --- training; losses stay on the device until the end of an epoch
    history: list[float] = []
    num_correct = torch.zeros((), device=context.device)
    sum_losses = torch.zeros((), device=context.device)
    with torch.random.fork_rng(devices=[]), context.progress.bar(total_steps, description) as bar:
        torch.manual_seed(seed)  # for dropout
        for step, (images, y) in enumerate(loader.batches(total_steps)):
            optimizer.param_groups[0]["lr"] = lr_at(step, total_steps, 0, lr, loader.batch_size)
            with context.autocast():
                logits = network(normalize(images)).float()
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            num_correct += (logits.detach().argmax(dim=1) == y).sum()
            sum_losses += loss.detach()
            bar.advance(step + 1)
            if (step + 1) % loader.batches_per_epoch == 0:
                mean_loss = sum_losses.item() / loader.batches_per_epoch
                history.append(num_correct.item() / (loader.batches_per_epoch * loader.batch_size))
                if not math.isfinite(mean_loss):
                    where = f"in epoch {len(history)} at lr {lr:g}"
                    raise DivergedError(f"finetune: the loss must be finite, it is not {where}; use a smaller --lr")
                num_correct.zero_()
                sum_losses.zero_()
                bar.update(step + 1, f"epoch {len(history)}/{epochs}, loss {mean_loss:.3f}, {history[-1]:.1%}")
    return FinetuneResult(network.eval(), tuple(history))


def _initial_head(dim: int, num_classes: int, generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    head.weight.data.copy_(truncated_normal(num_classes, dim, generator))
    head.bias.data.zero_()
    return head
