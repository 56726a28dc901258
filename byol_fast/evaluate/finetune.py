"""The whole network, trained further on labelled images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.data import ImageSource
from byol_fast.evaluate.encoder import Subject, Workplace
from byol_fast.evaluate.linear import nesterov, truncated_normal
from byol_fast.evaluate.metrics import accuracy
from byol_fast.evaluate.supervised_loader import Crops, generator
from byol_fast.models.encoders import feature_dim
from byol_fast.optim.schedules import lr_at

MIN_STEPS_PER_EPOCH = 12
"""The paper's fine-tuning on 1 % of ImageNet makes 12 steps an epoch; fewer images are taken in smaller batches."""
SMALLEST_BATCH = 16


class DivergedError(ValueError):
    """The loss is not finite any more."""


class Classifier(nn.Module):
    """An encoder with a linear layer behind it."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, C]` of normalised images `[B, 3, S, S]`."""
        logits: Tensor = self.head(self.encoder(x).flatten(1))
        return logits


def batch_size_for(num_images: int, asked: int) -> int:
    """Images a step: as asked, but so few that an epoch has 12 steps, if that leaves 16."""
    return min(asked, max(num_images // MIN_STEPS_PER_EPOCH, SMALLEST_BATCH), num_images)


@dataclass(frozen=True, slots=True, eq=False)
class Finetuned:
    """A network after its last epoch."""

    network: Classifier
    """On the device, in eval mode."""
    history: tuple[float, ...]
    """Accuracy on the crops of each epoch, while it learned."""


def finetune(
    subject: Subject,
    encoder: nn.Module,
    source: ImageSource,
    workplace: Workplace,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    what: str,
) -> Finetuned:
    """Train encoder and a new linear classifier on labelled images.

    SGD with Nesterov momentum 0.9, the rate `lr * batch_size / 256` with cosine decay to 0, no weight decay, random
    crops and flips, batch norms in train mode (BYOL, arXiv 2006.07733, appendix C, and its `eval_experiment.py`).

    Args:
        subject: says how images become input.
        encoder: begins from these weights; itself unchanged.
        source: labelled images.
        workplace: device and arithmetic.
        lr: for a batch of 256.
        epochs: passes over the images.
        batch_size: images a step.
        seed: of the classifier's first weights, the order of the images and the crops.
        what: for the progress.

    Returns:
        The network of the last epoch.

    Raises:
        DivergedError: the loss is not finite.
    """
    num_classes = len(source.classes)
    dim = feature_dim(encoder, subject.image_size)
    head = nn.Linear(dim, num_classes)
    head.weight.data.copy_(truncated_normal(num_classes, dim, generator(seed)))
    head.bias.data.zero_()
    network = workplace.placed(Classifier(encoder, head)).train().requires_grad_()
    assert isinstance(network, Classifier)
    normalize = subject.normalize.to(workplace.device)
    crops = Crops(subject, source, workplace, batch_size=batch_size, seed=seed)
    steps = epochs * crops.steps_per_epoch
    optimizer = nesterov(network.parameters())
    history = []
    hits = torch.zeros((), device=workplace.device)
    losses = torch.zeros((), device=workplace.device)
    with torch.random.fork_rng(devices=[]), workplace.progress.bar(steps, what) as bar:
        torch.manual_seed(seed)  # what networks draw themselves: dropout
        for step, (images, y) in enumerate(crops.take(steps)):
            optimizer.param_groups[0]["lr"] = lr_at(step, steps, 0, lr, crops.batch_size)
            with workplace.autocast():
                logits = network(normalize(images)).float()
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            hits += (logits.detach().argmax(dim=1) == y).sum()
            losses += loss.detach()
            if (step + 1) % crops.steps_per_epoch == 0:
                mean_loss = losses.item() / crops.steps_per_epoch
                history.append(hits.item() / (crops.steps_per_epoch * crops.batch_size))
                if not math.isfinite(mean_loss):
                    raise DivergedError(
                        f"finetune: the loss must be finite, it is not in epoch {len(history)} at lr {lr:g}; use a "
                        "smaller --lr"
                    )
                hits.zero_()
                losses.zero_()
                bar.update(step + 1, f"epoch {len(history)}/{epochs}, loss {mean_loss:.3f}, {history[-1]:.1%}")
    return Finetuned(network.eval(), tuple(history))


def choose(
    subject: Subject,
    encoder: nn.Module,
    fit: ImageSource,
    held: ImageSource,
    workplace: Workplace,
    *,
    candidates: Sequence[tuple[float, int]],
    batch_size: int,
    seed: int,
    what: str,
) -> list[tuple[float, int, float]]:
    """Train once for each candidate, on images that leave out those it is then judged by.

    Args:
        subject: as for `finetune`.
        encoder: as for `finetune`.
        fit: images to learn from.
        held: images to judge by; no test images.
        workplace: as for `finetune`.
        candidates: learning rates and epochs.
        batch_size: as for `finetune`.
        seed: as for `finetune`.
        what: for the progress.

    Returns:
        Learning rate, epochs and accuracy on `held` of each; 0 where it diverged.

    Raises:
        DivergedError: all of them did.
    """
    found = []
    finite = 0
    for lr, epochs in candidates:
        name = f"{what}, lr {lr:g}, {epochs} epochs"
        try:
            tuned = finetune(
                subject, encoder, fit, workplace, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, what=name
            )
        except DivergedError as error:
            workplace.progress.say(str(error))
            found.append((lr, epochs, 0.0))
            continue
        logits, y = workplace.features(subject, tuned.network, held, "held-out images")
        finite += 1
        found.append((lr, epochs, accuracy(logits, y)))
        workplace.progress.say(f"{name}: {found[-1][2]:.1%} of {len(y)} held-out images")
    if not finite:
        raise DivergedError(
            f"finetune: the loss must be finite, it is not for any of {len(found)} candidates; use a smaller --lr"
        )
    return found
