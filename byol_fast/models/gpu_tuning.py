"""GPU performance: the first convolution, the max pooling and the batch norms before a ReLU of a ResNet."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from byol_fast.models.split_batchnorm_layers import takes_relu
from byol_kernels import max_pool2d_3x3


def tune_for_gpu(network: nn.Module) -> int:
    """Convert layers of a ResNet to forms that are faster on a GPU, in place.

    These are the first convolution, the max pooling, and the classes of torchvision's ResNets, but not their
    subclasses: their batch norms then apply the ReLU. The functions are the same, the rounding of the convolution
    differs; see the classes below for where they are used. In all other cases, on CPUs above all, the layers call
    torch. `torch.jit.script` cannot compile converted layers.

    Args:
        network: any network; parameters keep their names and values.

    Returns:
        Number of converted layers.
    """
    num_converted = 0
    for module in network.modules():
        kind = _class_for(module)
        if kind is not None:
            module.__class__ = kind
            num_converted += 1
    return num_converted


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d and _is_first_convolution(module):
        return SpaceToDepthConv2d
    if type(module) is nn.MaxPool2d and _is_first_pooling(module):
        return GatherMaxPool2d
    # With another activation, or a forward pass of its own, a block stays as it is.
    return _BLOCKS.get(type(module)) if type(getattr(module, "relu", None)) is nn.ReLU else None


def _is_first_convolution(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and conv.in_channels == 3 and (conv.kernel_size, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))


def _is_first_pooling(pool: nn.MaxPool2d) -> bool:
    values = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    geometry = [(value, value) if isinstance(value, int) else tuple(value) for value in values]
    return geometry == [(3, 3), (2, 2), (1, 1), (1, 1)] and not pool.ceil_mode and not pool.return_indices


class SpaceToDepthConv2d(nn.Conv2d):
    """`nn.Conv2d` of 3 channels, 7x7, stride 2 and padding 3; in half precision on a GPU as 4x4 on 16 channels.

    Matrix units take channels by eights, so cuDNN pads 3 to 8. Here each block of 2x2 pixels becomes one pixel of 12
    channels, padded to 16 (MLPerf's submissions call it space-to-depth). `torch.fx` and `torch.jit.script` cannot trace
    the choice between both.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """The function of `nn.Conv2d`."""
        dtype, is_accepted = input.dtype, input.dtype == self.weight.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            is_accepted = input.dtype in {dtype, torch.float32}
        is_half = is_accepted and dtype.itemsize == 2
        is_even = input.ndim == 4 and input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0
        if not (input.is_cuda and is_half and is_even and input.shape[1] == 3):
            return super().forward(input)
        return space_to_depth_conv(input.to(dtype), self.weight.to(dtype), self.bias)


def space_to_depth_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d(x, weight, bias, stride=2, padding=3)` by a convolution of stride 1 on a quarter of the pixels.

    Output i reads pixels 2i-3 to 2i+3: with an eighth weight, zero, in front, the four pairs that begin at 2i-4.

    Args:
        x: images `[B, 3, H, W]` with even H and W.
        weight: `[O, 3, 7, 7]`.
        bias: `[O]`.
    """
    return F.conv2d(pairs_to_channels(x, 4, 2), pairs_to_channels(weight, 1, 0), bias)


def pairs_to_channels(x: Tensor, before: int, after: int) -> Tensor:
    """Pad rows and columns, then make the channels of 2x2 pixels 16 channels of one; in NHWC memory.

    Args:
        x: `[N, 3, H, W]`.
        before: zeros in front of the rows and the columns.
        after: zeros behind them.
    """
    x_NHWC = F.pad(x.permute(0, 2, 3, 1), (0, 1, before, after, before, after))
    images, height, width, channels = x_NHWC.shape
    pairs = x_NHWC.reshape(images, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    return pairs.reshape(images, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)


class GatherMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` of 3x3, stride 2 and padding 1; on a GPU by `byol_kernels.max_pool2d_3x3`.

    The gradient that inductor generates takes longer over its indices than over the memory.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.MaxPool2d

    def forward(self, input: Tensor) -> Tensor:
        """The function of `nn.MaxPool2d`."""
        if input.is_cuda and input.ndim == 4:
            return max_pool2d_3x3(input)
        result: Tensor = super().forward(input)
        return result


def _norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """A norm and an activation, in one if the norm can apply it. Hooks of the norm then see what the ReLU returns."""
    fused = type(relu) is nn.ReLU and takes_relu(norm)
    return cast("Tensor", norm(x, relu=True) if fused else relu(norm(x)))


class NormReluBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's `BasicBlock`, whose first batch norm applies the ReLU."""

    plain_class: ClassVar[type[nn.Module]] = BasicBlock

    def forward(self, x: Tensor) -> Tensor:
        """The function of `BasicBlock`."""
        out = _norm_relu(self.bn1, self.relu, self.conv1(x))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return cast("Tensor", self.relu(out))


class NormReluBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's `Bottleneck`, whose first two batch norms apply the ReLU."""

    plain_class: ClassVar[type[nn.Module]] = Bottleneck

    def forward(self, x: Tensor) -> Tensor:
        """The function of `Bottleneck`."""
        out = _norm_relu(self.bn1, self.relu, self.conv1(x))
        out = _norm_relu(self.bn2, self.relu, self.conv2(out))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return cast("Tensor", self.relu(out))


class NormReluResNet(ResNet):  # type: ignore[misc]
    """torchvision's `ResNet`, whose first batch norm applies the ReLU."""

    plain_class: ClassVar[type[nn.Module]] = ResNet

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(_norm_relu(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast("Tensor", self.fc(torch.flatten(self.avgpool(x), 1)))


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: NormReluBasicBlock,
    Bottleneck: NormReluBottleneck,
    ResNet: NormReluResNet,
}
