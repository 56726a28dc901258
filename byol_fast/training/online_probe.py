"""A linear classifier that learns beside the encoder, from features the step computes anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-5
MIN_WEIGHT = 0.01
"""The statistics that features are standardised with when none are at hand forget at this rate."""


class OnlineProbe:
    """Multinomial logistic regression on the standardised, detached features of the training views.

    Nothing goes back to the encoder: the features carry no gradient, the weights begin at zero, and no random number is
    drawn. Its gradient is written out (`(softmax - one_hot)^T x / B`), Adam applies it.

    Args:
        feature_dim: size of the features.
        num_classes: number of classes.
        lr: Adam's learning rate.
        device: where the features are.
        all_reduce_mean: with several processes, averages a tensor over them, in place.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        lr: float,
        device: torch.device,
        all_reduce_mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(num_classes, feature_dim, device=device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device))
        self.mean = torch.zeros(feature_dim, device=device)
        self.var = torch.ones(feature_dim, device=device)
        self.steps = 0
        """Steps it has seen."""
        # The fused form can skip an update by a flag on the device.
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=lr, fused=True, capturable=cuda)
        self._all_reduce_mean = all_reduce_mean

    @torch.no_grad()
    def learn(self, features: Sequence[Tensor], labels: Tensor, bad: Tensor) -> Tensor:
        """Classify the views of a step, then learn from them; the host waits for nothing.

        Args:
            features: of each batch of the step, `[2B, D]`: both views, one after the other.
            labels: classes of the images of all batches, int64, on any device.
            bad: scalar, 1 where the step was skipped: then nothing is learned.

        Returns:
            Share of the views that were classified rightly before anything was learned from them, fp32 scalar.
        """
        sizes = [len(f) // 2 for f in features]
        labels = labels.to(self.bias.device, non_blocking=True)
        y = torch.cat([part.repeat(2) for part in torch.split(labels, sizes)])
        x = torch.nan_to_num(torch.cat(list(features)).float(), nan=0.0, posinf=0.0, neginf=0.0)
        bad = bad.float()
        var, mean = torch.var_mean(x, dim=0, correction=0)
        weight = (1 - bad) * max(1 / (self.steps + 1), MIN_WEIGHT)
        self.mean.lerp_(mean, weight)
        self.var.lerp_(var, weight)
        self.steps += 1
        x = (x - mean) * (var + EPS).rsqrt_()
        logits = torch.addmm(self.bias, x, self.weight.T)
        right = (logits.argmax(dim=1) == y).float().mean()
        error = logits.softmax(dim=1)
        error.scatter_add_(1, y[:, None], error.new_full((len(y), 1), -1.0)).div_(len(y))
        self.weight.grad, self.bias.grad = error.T @ x, error.sum(dim=0)
        if self._all_reduce_mean is not None:
            for parameter in (self.weight, self.bias):
                assert parameter.grad is not None
                self._all_reduce_mean(parameter.grad)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return right

    @torch.no_grad()
    def top1(self, features_ND: Tensor, labels: Tensor) -> float:
        """Share of images that are classified rightly, 0..1.

        Args:
            features_ND: `[N, D]`.
            labels: classes `[N]`, on any device.
        """
        x = (features_ND.to(self.mean) - self.mean) * (self.var + EPS).rsqrt()
        found = torch.addmm(self.bias, x, self.weight.T).argmax(dim=1)
        return float((found == labels.to(found.device)).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics and the optimizer's state."""
        return {
            "weight": self.weight.detach(),
            "bias": self.bias.detach(),
            "mean": self.mean,
            "var": self.var,
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; the learning rate stays that of this probe.

        Raises:
            ValueError: it was taken of other features or classes.
        """
        if state["weight"].shape != self.weight.shape:
            raise ValueError(
                f"probe: its weights must be {list(self.weight.shape)} (classes, features), got "
                f"{list(state['weight'].shape)}; it begins anew"
            )
        for name in ("weight", "bias", "mean", "var"):
            getattr(self, name).copy_(state[name])
        self.steps = state["steps"]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
