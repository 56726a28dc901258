"""Linear classifier that is trained beside the encoder, on features of the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.evaluate.metrics import classify
from byol_fast.utils.checkpoint import optimizer_problem, tensor_problem

MAX_WEIGHTS = 1 << 27
"""Largest number of weights: with gradients and Adam's state they take 2 GiB."""
EPS = 1e-5
MAX_STEPS = 100
"""Number of steps over which the running statistics average; they standardize single images."""


class OnlineProbe:
    """Multinomial logistic regression on the standardized features of the training views.

    Training the encoder is not affected: features are detached, initial weights are zero, and no random numbers are
    used. The gradient is computed in closed form, `(softmax - one_hot)^T x / B`, and applied by Adam.

    Args:
        feature_dim: size of the features.
        num_classes: number of classes.
        lr: Adam's learning rate.
        device: device of the features.
        all_reduce_mean: averages a tensor over all processes, in place; None with a single process.
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
        self.steps = torch.zeros((), device=device)
        """Number of steps that were not skipped."""
        # Fused Adam can skip an update by a flag on the device.
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=lr, fused=True, capturable=cuda)
        self._all_reduce_mean = all_reduce_mean

    @torch.no_grad()
    def learn(self, features: Sequence[Tensor], labels: Tensor, skipped: Tensor) -> Tensor:
        """Classify the views of a step, then train on them, without host synchronization.

        Args:
            features: of each batch of the step, `[2B, D]`, the two global views stacked.
            labels: classes of the images of all batches, int64, on any device.
            skipped: 0-dim, 1 if the step was skipped; then the probe is not trained either.

        Returns:
            Accuracy on the views before the update, fp32 scalar, 0..1.
        """
        sizes = [len(f) // 2 for f in features]
        labels = labels.to(self.bias.device, non_blocking=True)
        y = torch.cat([part.repeat(2) for part in torch.split(labels, sizes)])
        x = torch.nan_to_num(torch.cat(list(features)).float(), nan=0.0, posinf=0.0, neginf=0.0)
        skipped = skipped.float()
        # --- statistics
        var, mean = torch.var_mean(x, dim=0, correction=0)
        trained = 1 - skipped
        weight = trained / self.steps.add_(trained).clamp(1, MAX_STEPS)  # the first step replaces the initial values
        self.mean.lerp_(mean, weight)
        self.var.lerp_(var, weight)
        x = (x - mean) * (var + EPS).rsqrt_()

        # --- predictions and gradient
        logits = torch.addmm(self.bias, x, self.weight.T)
        accuracy = (logits.argmax(dim=1) == y).float().mean()
        error = logits.softmax(dim=1)
        error.scatter_add_(1, y[:, None], error.new_full((len(y), 1), -1.0)).div_(len(y))
        self.weight.grad, self.bias.grad = error.T @ x, error.sum(dim=0)
        if self._all_reduce_mean is not None:
            for parameter in (self.weight, self.bias):
                assert parameter.grad is not None
                self._all_reduce_mean(parameter.grad)

        # --- update, unless the step was skipped
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return accuracy

    @torch.no_grad()
    def top1(self, features_ND: Tensor, labels: Tensor) -> float:
        """Accuracy on images, 0..1, with the running statistics.

        Args:
            features_ND: `[N, D]`.
            labels: classes `[N]`, on any device.
        """
        x = (features_ND.to(self.mean) - self.mean) * (self.var + EPS).rsqrt()
        predictions = classify(lambda rows: torch.addmm(self.bias, rows, self.weight.T), x, self.num_classes)
        return float((predictions == labels.to(predictions.device)).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics and optimizer state."""
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
        """Restore a state; the settings of this probe's optimizer are kept.

        Raises:
            ValueError: the number of features or classes differs.
        """
        tensors, own = ({k: v for k, v in s.items() if k != "optimizer"} for s in (state, self.state_dict()))
        problem = tensor_problem(tensors, own) or optimizer_problem(state["optimizer"], self.optimizer)
        if problem is not None:
            raise ValueError(f"probe: {problem}; training it from the start")
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": settings})
