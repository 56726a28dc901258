"""Drop-in replacements for lightly: loss, LARS, EMA update and transforms with its names, signatures and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.compat.precision import split_by_precision
from byol_fast.compat.random_views import image_tensor, random_view
from byol_fast.compat.timm import ModelEmaV3
from byol_fast.compat.torch import AveragedModel, get_ema_multi_avg_fn
from byol_fast.config import ViewConfig
from byol_fast.models.base import IMAGENET_MEAN, IMAGENET_STD
from byol_fast.models.layers import Normalize
from byol_kernels import ema_update_, normalized_mse_loss
from byol_kernels.derivatives import is_transformed
from byol_kernels.layout import same_layout

__all__ = [
    "LARS",
    "AveragedModel",
    "BYOLTransform",
    "BYOLView1Transform",
    "BYOLView2Transform",
    "ModelEmaV3",
    "NegativeCosineSimilarity",
    "get_ema_multi_avg_fn",
    "update_momentum",
]

_MAX_EPS = 1e-6


class NegativeCosineSimilarity(nn.Module):
    """Loss of lightly: negative mean cosine similarity, `-mean(x0 x1 / (max(|x0|, eps) max(|x1|, eps)))`.

    One launch for rows `[B, D]` if only `x0` needs a gradient, as in BYOL and SimSiam; otherwise (other dimensions, a
    gradient of `x1`, an eps above 1e-6, `torch.func`, forward mode) torch's own function. The gradient differs from
    torch's for rows whose norm is below eps but not zero: they are treated as divided by the constant eps.

    Args:
        dim: dimension of the cosine.
        eps: smallest norm to divide by.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Mean negative cosine similarity.

        Args:
            x0: predictions `[B, D]`.
            x1: targets `[B, D]`.
        """
        are_rows = x0.ndim == 2 and self.dim in {1, -1} and x0.shape == x1.shape and x0.numel() > 0
        match = x0.dtype == x1.dtype and x0.device == x1.device and x0.is_floating_point()
        x1_needs_grad = x1.requires_grad and torch.is_grad_enabled()
        if x1_needs_grad or is_transformed() or not (are_rows and match and 0 < self.eps <= _MAX_EPS):
            return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
        return normalized_mse_loss(x0, x1, eps=self.eps) * 0.5 - 1.0


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """EMA update of lightly: `ema = m * ema + (1 - m) * model`, parameters only, in one launch.

    Averages in bfloat16 and float16 are updated by torch's operators, as in lightly: most updates are below half a unit
    in the last place, and lost.

    Args:
        model: trained network.
        model_ema: network that is updated.
        m: decay from 0 to 1.

    Raises:
        ValueError: the networks differ, or m is out of range.
    """
    full, low = split_by_precision(model_ema.parameters(), model.parameters())
    ema_update_(*full, m)
    if low[0]:
        torch._foreach_mul_(low[0], m)
        torch._foreach_add_(low[0], low[1], alpha=1.0 - m)


class LARS(torch.optim.Optimizer):
    """LARS of lightly (its rule is also known as LARC), without host synchronization on a GPU.

    Per tensor of a group with weight decay: `r = trust_coefficient |p| / (|g| + weight_decay |p| + eps)`, and
    `d = r (g + weight_decay p)`; `d = g` in a group without, and where |p| or |g| is 0. Then SGD with momentum:
    `v = momentum v + (1 - dampening) d` (`v = d` in the first step), `p -= lr v`. `byol_kernels.LARS` has the rule of
    BYOL's reference, in two launches on a GPU, including the EMA of the target.

    With momentum on a CPU, each tensor takes one pass of torch's fused SGD after its norms; operators over lists, which
    need no host synchronization, take 2.7 times as long there.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: decay of the momentum.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty; 0 also disables the adaptation.
        nesterov: use Nesterov momentum.
        trust_coefficient: factor of the adaptation.
        eps: added to the denominator.

    Raises:
        ValueError: invalid hyperparameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"LARS: {name} must be 0 or more, got {value}; BYOL's are 0.2, 0.9 and 1.5e-6")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"LARS: nesterov must be used with momentum and without dampening, got momentum {momentum} and "
                f"dampening {dampening}; set nesterov=False"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    groups.setdefault((p.device, p.dtype), []).append(p)
            for (device, dtype), params in groups.items():
                can_fuse = device.type == "cpu" and dtype in {torch.float32, torch.float64}
                if can_fuse and group["momentum"] != 0 and not group["nesterov"]:
                    self._step_fused(params, group)
                else:
                    self._step_foreach(params, group)
        return loss

    def _step_fused(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Norms, then one pass of torch's fused SGD per tensor, whose factor `1 - dampening` serves as the ratio."""
        decay, momentum = group["weight_decay"], group["momentum"]
        unscaled: list[Tensor] = []
        for p in params:
            grad, is_first = p.grad, "momentum_buffer" not in self.state[p]
            assert grad is not None
            if grad.dtype != p.dtype or not (same_layout(grad, p) and (is_first or same_layout(self._buffer(p), p))):
                self._step_foreach([p], group)
                continue
            ratio = self._ratio(p, grad, group)
            factor = (1.0 if ratio is None else ratio) * (1.0 if is_first else 1.0 - group["dampening"])
            if is_first:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if ratio is None and factor == 1.0:
                unscaled.append(p)
                continue
            _fused_sgd([p], [grad], [self._buffer(p)], group["lr"], momentum, 0.0 if ratio is None else decay, factor)
        if unscaled:
            grads = [cast("Tensor", p.grad) for p in unscaled]
            _fused_sgd(unscaled, grads, [self._buffer(p) for p in unscaled], group["lr"], momentum, 0.0, 1.0)

    @staticmethod
    def _ratio(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> float | None:
        """Ratio of the adaptation as a number on the host; None if the gradient is used unchanged."""
        if group["weight_decay"] == 0:
            return None
        p_norm, g_norm = torch.linalg.vector_norm(p).item(), torch.linalg.vector_norm(grad).item()
        if p_norm == 0 or g_norm == 0:
            return None
        return float(group["trust_coefficient"] * p_norm / (g_norm + p_norm * group["weight_decay"] + group["eps"]))

    def _step_foreach(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Operators over lists of tensors, on any device and without host synchronization."""
        decay, momentum = group["weight_decay"], group["momentum"]
        grads = [cast("Tensor", p.grad) for p in params]
        updates: list[Tensor] = grads
        if decay != 0:
            p_norms, g_norms = (torch.stack(torch._foreach_norm(list(x))) for x in (params, grads))
            ratios = group["trust_coefficient"] * p_norms / (g_norms + p_norms * decay + group["eps"])
            adapt = (p_norms != 0) & (g_norms != 0)
            of_grad, of_param = torch.where(adapt, ratios, 1.0), torch.where(adapt, ratios * decay, 0.0)
            updates = list(torch._foreach_mul(grads, list(of_grad.unbind())))
            torch._foreach_addcmul_(updates, params, list(of_param.unbind()))
        if momentum != 0:
            has_buffer = ["momentum_buffer" in self.state[p] for p in params]
            for p, update, initialized in zip(params, updates, has_buffer, strict=True):
                if not initialized:
                    self.state[p]["momentum_buffer"] = update.clone()
            old = [
                (self._buffer(p), u)
                for p, u, initialized in zip(params, updates, has_buffer, strict=True)
                if initialized
            ]
            if old:
                torch._foreach_mul_([b for b, _ in old], momentum)
                torch._foreach_add_([b for b, _ in old], [u for _, u in old], alpha=1 - group["dampening"])
            buffers = [self._buffer(p) for p in params]
            updates = list(torch._foreach_add(updates, buffers, alpha=momentum)) if group["nesterov"] else buffers
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _buffer(self, p: Tensor) -> Tensor:
        return cast("Tensor", self.state[p]["momentum_buffer"])


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    decay: float,
    factor: float,
) -> None:
    """`v = momentum v + factor (g + decay p)`, then `p -= lr v`."""
    torch._fused_sgd_(
        params, grads, buffers, weight_decay=decay, momentum=momentum, lr=lr, dampening=1.0 - factor,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


IMAGENET_NORMALIZE: dict[str, Sequence[float]] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class BYOLView1Transform:
    """First view of lightly, with its parameter names and our kernels; `config` holds them as a `ViewConfig`.

    Crops are bilinear, torchvision's default; the blur is a true Gaussian, PIL's three box filters. Vertical flips and
    rotations are not supported.

    Args:
        input_size: height and width of the view in pixels.
        cj_prob: probability of color jitter.
        cj_strength: factor of the next four.
        cj_bright: brightness.
        cj_contrast: contrast.
        cj_sat: saturation.
        cj_hue: hue.
        min_scale: smallest area of a crop, relative to the image.
        random_gray_scale: probability of grayscale.
        gaussian_blur: probability of blur; None: 1, for the second view 0.1.
        solarization_prob: probability of solarizing; None: 0, for the second view 0.2.
        sigmas: smallest and largest standard deviation of the blur in pixels.
        vf_prob: must be 0.
        hf_prob: probability of a horizontal flip.
        rr_prob: must be 0.
        rr_degrees: must be None.
        normalize: `mean` and `std`; None for values from 0 to 1.

    Raises:
        ValueError: a parameter is out of range or not supported.
    """

    blur, solarize = 1.0, 0.0
    """Default probabilities."""

    def __init__(
        self,
        input_size: int = 224,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.4,
        cj_contrast: float = 0.4,
        cj_sat: float = 0.2,
        cj_hue: float = 0.1,
        min_scale: float = 0.08,
        random_gray_scale: float = 0.2,
        gaussian_blur: float | None = None,
        solarization_prob: float | None = None,
        sigmas: tuple[float, float] = (0.1, 2),
        vf_prob: float = 0.0,
        hf_prob: float = 0.5,
        rr_prob: float = 0.0,
        rr_degrees: float | tuple[float, float] | None = None,
        normalize: Mapping[str, Sequence[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        for name, value, off in (
            ("vf_prob", vf_prob, 0),
            ("rr_prob", rr_prob, 0),
            ("rr_degrees", rr_degrees, None),
        ):
            if value != off:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be {off}, got {value}; vertical flips and "
                    "rotations are not supported: apply them before, or use lightly's transform"
                )
        self.config = ViewConfig(
            size=input_size,
            scale=(min_scale, 1.0),
            interpolation="bilinear",
            hflip_p=hf_prob,
            color_jitter_p=cj_prob,
            brightness=cj_strength * cj_bright,
            contrast=cj_strength * cj_contrast,
            saturation=cj_strength * cj_sat,
            hue=cj_strength * cj_hue,
            grayscale_p=random_gray_scale,
            blur_p=self.blur if gaussian_blur is None else gaussian_blur,
            blur_sigma=sigmas,
            blur_kernel=0,
            solarize_p=self.solarize if solarization_prob is None else solarization_prob,
        )
        mean, std = ((0.0,) * 3, (1.0,) * 3) if normalize is None else (normalize["mean"], normalize["std"])
        self._normalize = Normalize(_triple("mean", mean), _triple("std", std))

    def __call__(self, image: Any) -> Tensor:
        """View of an image, or of each image of a batch.

        Args:
            image: a PIL image, a uint8 array `[H, W, 3]`, or a tensor `[3, H, W]` or `[B, 3, H, W]`: uint8, or floating
                point from 0 to 1. A batch on a GPU stays there.

        Returns:
            fp32 `[3, S, S]` or `[B, 3, S, S]`, normalized.

        Raises:
            ValueError: not such an image.
        """
        what = type(self).__name__
        tensor = image_tensor(what, image)
        if tensor.is_floating_point():
            tensor = (tensor * 255).round_().clamp_(0, 255).to(torch.uint8)
        elif tensor.dtype != torch.uint8:
            raise ValueError(
                f"{what}: image must be uint8 or floating point, got {tensor.dtype}; convert it with .to()"
            )
        images = tensor if tensor.ndim == 4 else tensor[None]
        views = cast("Tensor", self._normalize.to(images.device)(random_view(images, self.config)))
        return views if tensor.ndim == 4 else views[0]


class BYOLView2Transform(BYOLView1Transform):
    """Second view of lightly: like the first, with probability 0.1 of blur and 0.2 of solarization."""

    blur, solarize = 0.1, 0.2


class BYOLTransform:
    """Pair of views of lightly: called with an image or a batch, it returns a list of both.

    Args:
        view_1_transform: of the first view; `BYOLView1Transform()` if None.
        view_2_transform: of the second view; `BYOLView2Transform()` if None.
    """

    def __init__(
        self,
        view_1_transform: Callable[[Any], Tensor] | None = None,
        view_2_transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.transforms = [view_1_transform or BYOLView1Transform(), view_2_transform or BYOLView2Transform()]

    def __call__(self, image: Any) -> list[Tensor]:
        """Both views of an image or a batch."""
        return [transform(image) for transform in self.transforms]


def _triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"BYOLTransform: {name} must be three numbers, got {list(values)}; images have three channels")
    first, second, third = (float(value) for value in values)
    return first, second, third
