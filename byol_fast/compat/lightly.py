"""Drop-ins for lightly: loss, LARS, EMA update and transforms with its names, signatures and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.compat.random_views import image_tensor, random_view
from byol_fast.compat.timm import ModelEmaV3
from byol_fast.compat.torch import AveragedModel, get_ema_multi_avg_fn
from byol_fast.config import ViewConfig
from byol_fast.models.base import IMAGENET_MEAN, IMAGENET_STD
from byol_fast.models.layers import Normalize
from byol_kernels import ema_update_, normalized_mse_loss
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


# ------------------------------------------------------------------------------------------------ lightly


_LARGEST_EPS = 1e-6


class NegativeCosineSimilarity(nn.Module):
    """The loss of lightly: minus the mean cosine of partners, `-mean(x0 x1 / (max(|x0|, eps) max(|x1|, eps)))`.

    One launch for rows `[B, D]` where only `x0` wants a gradient, as in BYOL and SimSiam; anything else (other
    dimensions, a gradient to `x1`, an eps above 1e-6) goes to torch's own function. Rows that are shorter than eps but
    not zero get another gradient than torch's: none along the row, as if they were divided by the constant eps.

    Args:
        dim: along which the cosine is taken.
        eps: smallest norm that is divided by.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The mean negative cosine similarity.

        Args:
            x0: `[B, D]`, the predictions.
            x1: `[B, D]`, the targets.
        """
        rows = x0.ndim == 2 and self.dim in {1, -1} and x0.shape == x1.shape and x0.numel() > 0
        alike = x0.dtype == x1.dtype and x0.device == x1.device and x0.is_floating_point()
        both_learn = x1.requires_grad and torch.is_grad_enabled()
        if both_learn or not (rows and alike and 0 < self.eps <= _LARGEST_EPS):
            return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
        return normalized_mse_loss(x0, x1, eps=self.eps) * 0.5 - 1.0


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """The moving average of lightly: `ema = m * ema + (1 - m) * model`, parameters only, in one launch.

    Args:
        model: the network that is trained.
        model_ema: the one that follows.
        m: decay from 0 to 1.

    Raises:
        ValueError: the networks differ, or m is out of range.
    """
    ema_update_(model_ema.parameters(), model.parameters(), m)


class LARS(torch.optim.Optimizer):
    """lightly's LARS (the rule that others call LARC), without a host synchronisation on a GPU.

    Per tensor of a group with weight decay: `r = trust_coefficient |p| / (|g| + weight_decay |p| + eps)`, and
    `d = r (g + weight_decay p)`; `d = g` in a group without, and where |p| or |g| is 0. Then SGD with momentum:
    `v = momentum v + (1 - dampening) d` (`v = d` at first), `p -= lr v`. `byol_kernels.LARS` is the reference's rule,
    in two launches on a GPU, the target's average among them.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: decay of the momentum.
        dampening: of the momentum.
        weight_decay: L2 penalty; 0 also leaves the adaptation out.
        nesterov: Nesterov's momentum.
        trust_coefficient: of the adaptation.
        eps: added to the denominator.

    Raises:
        ValueError: hyperparameters out of range.
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
                f"LARS: nesterov must go with a momentum and without dampening, got momentum {momentum} and dampening "
                f"{dampening}; leave nesterov out"
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
        """One step.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_kind.setdefault((p.device, p.dtype), []).append(p)
            for (device, dtype), params in by_kind.items():
                one_pass = device.type == "cpu" and dtype in {torch.float32, torch.float64}
                if one_pass and group["momentum"] != 0 and not group["nesterov"]:
                    self._in_one_pass(params, group)
                else:
                    self._step(params, group)
        return loss

    def _in_one_pass(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """On a CPU: norms, then all else while a tensor is read once; torch's fused SGD has `1 - dampening` for r."""
        decay, momentum = group["weight_decay"], group["momentum"]
        plain: list[Tensor] = []
        for p in params:
            grad, first = p.grad, "momentum_buffer" not in self.state[p]
            assert grad is not None
            if grad.dtype != p.dtype or not (same_layout(grad, p) and (first or same_layout(self._buffer(p), p))):
                self._step([p], group)
                continue
            ratio = self._ratio(p, grad, group)
            share = (1.0 if ratio is None else ratio) * (1.0 if first else 1.0 - group["dampening"])
            if first:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if ratio is None and share == 1.0:
                plain.append(p)
                continue
            _fused_sgd([p], [grad], [self._buffer(p)], group["lr"], momentum, 0.0 if ratio is None else decay, share)
        if plain:
            grads = [cast("Tensor", p.grad) for p in plain]
            _fused_sgd(plain, grads, [self._buffer(p) for p in plain], group["lr"], momentum, 0.0, 1.0)

    @staticmethod
    def _ratio(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> float | None:
        """The adaptation on a CPU; None where the gradient is taken as it is."""
        if group["weight_decay"] == 0:
            return None
        p_norm, g_norm = torch.linalg.vector_norm(p).item(), torch.linalg.vector_norm(grad).item()
        if p_norm == 0 or g_norm == 0:
            return None
        return float(group["trust_coefficient"] * p_norm / (g_norm + p_norm * group["weight_decay"] + group["eps"]))

    def _step(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """On any device, in operators that take lists of tensors; nothing is brought to the host."""
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
            known = ["momentum_buffer" in self.state[p] for p in params]
            for p, update, is_known in zip(params, updates, known, strict=True):
                if not is_known:
                    self.state[p]["momentum_buffer"] = update.clone()
            later = [(self._buffer(p), u) for p, u, is_known in zip(params, updates, known, strict=True) if is_known]
            if later:
                torch._foreach_mul_([b for b, _ in later], momentum)
                torch._foreach_add_([b for b, _ in later], [u for _, u in later], alpha=1 - group["dampening"])
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
    share: float,
) -> None:
    """`v = momentum v + share (g + decay p)`, then `p -= lr v`."""
    torch._fused_sgd_(
        params, grads, buffers, weight_decay=decay, momentum=momentum, lr=lr, dampening=1.0 - share,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


IMAGENET_NORMALIZE: dict[str, Sequence[float]] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class BYOLView1Transform:
    """lightly's first view under its parameters' names, drawn by our kernels; `config` says the same in ours.

    Crops are bilinear, as torchvision's default; the blur is a Gaussian, where PIL's is three boxes. What has no kernel
    here (vertical flips, rotations) is refused.

    Args:
        input_size: height and width of the view in pixels.
        cj_prob: probability of the colour jitter.
        cj_strength: factor of the four that follow.
        cj_bright: brightness.
        cj_contrast: contrast.
        cj_sat: saturation.
        cj_hue: hue.
        min_scale: smallest share of the image's area that a crop covers.
        random_gray_scale: probability of dropping the colour.
        gaussian_blur: probability of the blur; None: 1, for the second view 0.1.
        solarization_prob: probability of solarizing; None: 0, for the second view 0.2.
        sigmas: standard deviation of the blur in pixels, smallest and largest.
        vf_prob: 0.
        hf_prob: probability of mirroring left and right.
        rr_prob: 0.
        rr_degrees: None: there are no rotations.
        normalize: `mean` and `std` of the result; None leaves it from 0 to 1.

    Raises:
        ValueError: a parameter out of range, or one that asks for what there is not.
    """

    blur, solarize = 1.0, 0.0
    """Probabilities where none are given."""

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
        for name, value, nothing in (
            ("vf_prob", vf_prob, 0),
            ("rr_prob", rr_prob, 0),
            ("rr_degrees", rr_degrees, None),
        ):
            if value != nothing:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be {nothing}, got {value}; there are no vertical flips and "
                    "rotations here: transform the images before, or use lightly's"
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
        """A view of an image, or of each image of a batch.

        Args:
            image: a PIL image, a uint8 array `[H, W, 3]`, or a tensor `[3, H, W]` or `[B, 3, H, W]`: uint8, or floating
                point from 0 to 1. A batch on a GPU stays there.

        Returns:
            fp32 `[3, S, S]` or `[B, 3, S, S]`, normalised.

        Raises:
            ValueError: no such image.
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
    """lightly's second view: as the first, but blurred in one case of ten and solarized in two."""

    blur, solarize = 0.1, 0.2


class BYOLTransform:
    """lightly's pair of views: called with an image, or a batch, it returns the list of both.

    Args:
        view_1_transform: makes the first view; `BYOLView1Transform()` when None.
        view_2_transform: makes the second view; `BYOLView2Transform()` when None.
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
