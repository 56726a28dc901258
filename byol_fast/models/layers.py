"""Input normalization, and the MLP heads of BYOL and SimSiam."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byol_fast.config.fields import ChannelMean, ChannelStd, check


class Normalize(nn.Module):
    """Bytes to normalized floats: `(x / 255 - mean) / std`; input that is floating point passes unchanged.

    Args:
        mean: channel means of values scaled to 0..1.
        std: channel standard deviations of values scaled to 0..1.

    Raises:
        ValueError: not three numbers, or out of range.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        mean = check("normalize: mean", tuple[ChannelMean, ChannelMean, ChannelMean], mean)
        std = check("normalize: std", tuple[ChannelStd, ChannelStd, ChannelStd], std)
        mean64 = torch.tensor(mean, dtype=torch.float64)
        std64 = torch.tensor(std, dtype=torch.float64)
        # One multiply-add an element; computed in float64 so that only the last rounding is float32's.
        self.register_buffer("scale", (1 / (255 * std64)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("bias", (-mean64 / std64).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[B, 3, H, W]` uint8 to fp32; memory layout is kept."""
        return torch.addcmul(self.bias, x.to(self.scale.dtype), self.scale) if x.dtype == torch.uint8 else x


class MLPHead(nn.Sequential):
    """Projector or predictor: (Linear - BatchNorm - ReLU) x n - Linear (BYOL, arXiv 2006.07733, section 3.3: n = 1).

    Args:
        in_dim: size of the input.
        hidden_dim: size of the hidden layers.
        out_dim: size of the output.
        num_layers: linear layers in all, n + 1.
        hidden_bias: whether the layers before a batch norm have a bias (the reference's have one).
        last_bias: whether the last layer has a bias (the reference's has none).
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        num_layers: int = 2,
        hidden_bias: bool = True,
        last_bias: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            linear = nn.Linear(in_dim, hidden_dim, bias=hidden_bias)
            layers += [linear, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
            in_dim = hidden_dim
        super().__init__(*layers, nn.Linear(in_dim, out_dim, bias=last_bias))


def simsiam_projector(in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int = 3) -> nn.Sequential:
    """SimSiam's projector: as `MLPHead`, no biases, and a last BatchNorm without gamma and beta (arXiv 2011.10566)."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        in_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False))


def simsiam_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """SimSiam's predictor: a bottleneck, with a bias at the end only (arXiv 2011.10566)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),
    )
