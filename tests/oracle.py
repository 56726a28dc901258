"""BYOL restated by hand in numpy float64: the judge of the package's numbers.

Nothing here comes from the package or from an autograd: the formulas are those of the paper (arXiv 2006.07733, sections
3.1-3.3 and appendix J) and of its authors' code (google-deepmind/deepmind-research, `byol/byol_experiment.py` for the
order of a step, `byol/utils/helpers.py` for the loss, `byol/utils/schedules.py` for lr and tau, `byol/utils/
optimizers.py` for LARS, `byol/utils/networks.py` for the heads), written anew; every derivative is worked out in the
comments. Two conventions are PyTorch's: `x / max(|x|, eps)` as normalization, and running statistics that move by 0.1
towards the batch's with the unbiased variance.

The network is small, but it has every kind of layer a ResNet has that carries parameters or statistics:

    encoder    conv 3x3 stride 2 - BN - ReLU - conv 3x3 stride 1 - BN - ReLU - mean over the pixels
    projector  Linear with bias - BN - ReLU - Linear without bias; the predictor has the same shape
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Backward = Callable[[Array], Array]  # from d loss / d output to d loss / d input; adds its parameters' gradients
Gradients = dict[str, Array]

NORMALIZE_EPS = 1e-12
BN_EPS = 1e-5
BN_MOMENTUM = 0.1
CONV_STRIDES = (2, 1)
CONV_PADDING = 1


# ------------------------------------------------------------------------------------------------ loss


def normalize(x_BD: Array, eps: float = NORMALIZE_EPS) -> Array:
    """`x / max(|x|, eps)`, row by row."""
    norm_B1 = np.sqrt((x_BD**2).sum(axis=1, keepdims=True))
    normalized: Array = x_BD / np.maximum(norm_B1, eps)
    return normalized


def regression_loss(p_BD: Array, z_BD: Array, eps: float = NORMALIZE_EPS) -> float:
    """`mean_b sum_d (p / |p| - z / |z|)^2`; `2 - 2 cos` wherever neither row is zero."""
    return float(((normalize(p_BD, eps) - normalize(z_BD, eps)) ** 2).sum(axis=1).mean())


def regression_loss_gradient(p_BD: Array, z_BD: Array, eps: float = NORMALIZE_EPS) -> Array:
    """Gradient of `regression_loss` with respect to p.

    With u = p / |p| and v = z / max(|z|, eps): d|u - v|^2 / du = 2 (u - v). As du/dp = (1 - u u^T) / |p| and
    (1 - u u^T) u = 0, what is left is -2 (v - u (u.v)) / |p|. Up to eps the divisor is constant: du/dp = 1 / eps,
    the gradient 2 (u - v) / eps.
    """
    norm_B1 = np.sqrt((p_BD**2).sum(axis=1, keepdims=True))
    u, v = normalize(p_BD, eps), normalize(z_BD, eps)
    cosine_B1 = (u * v).sum(axis=1, keepdims=True)
    tangential = -2.0 * (v - u * cosine_B1) / np.where(norm_B1 > eps, norm_B1, 1.0)
    below_eps = 2.0 * (u - v) / eps
    gradient: Array = np.where(norm_B1 > eps, tangential, below_eps) / p_BD.shape[0]
    return gradient


def byol_loss(p1: Array, p2: Array, z1: Array, z2: Array, eps: float = NORMALIZE_EPS) -> float:
    """Both directions, summed: each view's prediction against the target's projection of the other view."""
    return regression_loss(p1, z2, eps) + regression_loss(p2, z1, eps)


# ------------------------------------------------------------------------------------------------ schedules


def tau(step: int, total_steps: int, tau_base: float) -> float:
    """`1 - (1 - tau_base) (cos(pi k / K) + 1) / 2`; stays 1 after step K."""
    k = min(step, total_steps)
    return 1.0 - (1.0 - tau_base) * (math.cos(math.pi * k / total_steps) + 1.0) / 2.0


def lr(step: int, total_steps: int, warmup_steps: int, base_lr: float, batch_size: int) -> float:
    """Linear from 0 over `warmup_steps`, then half a cosine over the `total_steps - warmup_steps` that are left."""
    peak = base_lr * batch_size / 256.0
    if step < warmup_steps:
        return peak * step / warmup_steps
    after = min(step, total_steps) - warmup_steps
    return peak * 0.5 * (1.0 + math.cos(math.pi * after / (total_steps - warmup_steps)))


# ------------------------------------------------------------------------------------------------ updates


def lars_update(
    parameter: Array,
    gradient: Array,
    momentum_buffer: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> tuple[Array, Array]:
    """New parameter and momentum buffer by the LARS rule of BYOL's authors.

    `d = g + wd p`, `r = trust_coefficient |p| / |d|` (1 where a norm is 0), `v = mu v + r d`, `p = p - lr v`. Vectors
    and scalars, that is biases and the parameters of norms, have neither decay nor adaptation: `d = g`, `r = 1`.
    """
    direction, ratio = gradient, 1.0
    if parameter.ndim > 1:
        direction = gradient + weight_decay * parameter
        parameter_norm, direction_norm = math.sqrt((parameter**2).sum()), math.sqrt((direction**2).sum())
        if parameter_norm > 0.0 and direction_norm > 0.0:
            ratio = trust_coefficient * parameter_norm / direction_norm
    new_buffer = momentum * momentum_buffer + ratio * direction
    return parameter - lr * new_buffer, new_buffer


def ema(target: Array, online: Array, tau: float) -> Array:
    """`tau target + (1 - tau) online`."""
    return tau * target + (1.0 - tau) * online


# ------------------------------------------------------------------------------------------------ layers


@dataclass
class Network:
    """Parameters and batch normalization's buffers by dotted name, as `encoder.conv1.weight`."""

    parameters: dict[str, Array]
    buffers: dict[str, Array]

    def copy(self) -> Network:
        return Network(
            {name: parameter.copy() for name, parameter in self.parameters.items()},
            {name: buffer.copy() for name, buffer in self.buffers.items()},
        )


def _add(grads: Gradients, name: str, gradient: Array) -> None:
    """Gradients of the two views add up."""
    grads[name] = grads[name] + gradient if name in grads else gradient


def conv(net: Network, name: str, x: Array, stride: int, grads: Gradients) -> tuple[Array, Backward]:
    """`y[n, o, i, j] = sum_cab w[o, c, a, b] x[n, c, s i + a - 1, s j + b - 1]`, zero outside the image.

    So every kernel offset (a, b) pairs one strided slice of the padded image with y, and the derivatives pair the same
    slice with dy: `dw[o, c, a, b] = sum_nij dy x`, and dx collects `sum_o w dy` in the slice.
    """
    weight = net.parameters[f"{name}.weight"]
    kernel = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (CONV_PADDING, CONV_PADDING), (CONV_PADDING, CONV_PADDING)))
    height, width = ((n - kernel) // stride + 1 for n in padded.shape[2:])

    def pixels(a: int, b: int) -> tuple[slice, slice, slice, slice]:
        rows = slice(a, a + stride * (height - 1) + 1, stride)
        columns = slice(b, b + stride * (width - 1) + 1, stride)
        return slice(None), slice(None), rows, columns

    y = np.zeros((x.shape[0], weight.shape[0], height, width))
    for a in range(kernel):
        for b in range(kernel):
            y += np.einsum("ncij,oc->noij", padded[pixels(a, b)], weight[:, :, a, b])

    def backward(dy: Array) -> Array:
        dweight, dpadded = np.zeros_like(weight), np.zeros_like(padded)
        for a in range(kernel):
            for b in range(kernel):
                dweight[:, :, a, b] = np.einsum("noij,ncij->oc", dy, padded[pixels(a, b)])
                dpadded[pixels(a, b)] += np.einsum("noij,oc->ncij", dy, weight[:, :, a, b])
        _add(grads, f"{name}.weight", dweight)
        return dpadded[:, :, CONV_PADDING:-CONV_PADDING, CONV_PADDING:-CONV_PADDING]

    return y, backward


def batch_norm(net: Network, name: str, x: Array, grads: Gradients) -> tuple[Array, Backward]:
    """Train mode, channels in dimension 1; moves the running statistics of `net`.

    `y = gamma xhat + beta`, `xhat = (x - mean) / sqrt(var + eps)` with the biased variance of this batch of M values a
    channel. The backward: d beta = sum dy, d gamma = sum dy xhat; mean and variance depend on every x, which takes the
    mean and the xhat component out: `dx = gamma / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))`.
    """
    gamma, beta = net.parameters[f"{name}.weight"], net.parameters[f"{name}.bias"]
    over = tuple(d for d in range(x.ndim) if d != 1)
    per_channel = tuple(-1 if d == 1 else 1 for d in range(x.ndim))
    count = x.size // x.shape[1]
    mean = x.mean(axis=over)
    var = ((x - mean.reshape(per_channel)) ** 2).mean(axis=over)
    inverse_std = 1.0 / np.sqrt(var + BN_EPS)
    xhat: Array = (x - mean.reshape(per_channel)) * inverse_std.reshape(per_channel)
    y = gamma.reshape(per_channel) * xhat + beta.reshape(per_channel)

    running_mean, running_var = net.buffers[f"{name}.running_mean"], net.buffers[f"{name}.running_var"]
    net.buffers[f"{name}.running_mean"] = (1 - BN_MOMENTUM) * running_mean + BN_MOMENTUM * mean
    net.buffers[f"{name}.running_var"] = (1 - BN_MOMENTUM) * running_var + BN_MOMENTUM * var * count / (count - 1)
    net.buffers[f"{name}.num_batches_tracked"] = net.buffers[f"{name}.num_batches_tracked"] + 1

    def backward(dy: Array) -> Array:
        dbeta, dgamma = dy.sum(axis=over), (dy * xhat).sum(axis=over)
        _add(grads, f"{name}.weight", dgamma)
        _add(grads, f"{name}.bias", dbeta)
        centerd: Array = dy - (dbeta / count).reshape(per_channel) - xhat * (dgamma / count).reshape(per_channel)
        dx: Array = (gamma * inverse_std).reshape(per_channel) * centerd
        return dx

    return y, backward


def linear(net: Network, name: str, x: Array, grads: Gradients) -> tuple[Array, Backward]:
    """`y = x W^T + b`, the bias where there is one: `dW = dy^T x`, `db = sum dy`, `dx = dy W`."""
    weight, bias = net.parameters[f"{name}.weight"], net.parameters.get(f"{name}.bias")
    y = x @ weight.T if bias is None else x @ weight.T + bias

    def backward(dy: Array) -> Array:
        _add(grads, f"{name}.weight", dy.T @ x)
        if bias is not None:
            _add(grads, f"{name}.bias", dy.sum(axis=0))
        return dy @ weight

    return y, backward


def relu(x: Array) -> tuple[Array, Backward]:
    """`max(x, 0)`, whose derivative at 0 is 0."""
    return np.maximum(x, 0.0), lambda dy: np.where(x > 0.0, dy, 0.0)


def global_mean(x: Array) -> tuple[Array, Backward]:
    """Mean over the pixels; each gets an equal share of the gradient."""
    pixels = x.shape[2] * x.shape[3]
    return x.mean(axis=(2, 3)), lambda dy: np.broadcast_to(dy[:, :, None, None] / pixels, x.shape)


def _chain(backwards: list[Backward]) -> Backward:
    def backward(dy: Array) -> Array:
        for step_back in reversed(backwards):
            dy = step_back(dy)
        return dy

    return backward


# ------------------------------------------------------------------------------------------------ networks


def encoder(net: Network, view: Array, grads: Gradients) -> tuple[Array, Backward]:
    """Features [B, C] of a view [B, 3, H, W]."""
    x, backwards = view, []
    for number, stride in enumerate(CONV_STRIDES, start=1):
        x, back = conv(net, f"encoder.conv{number}", x, stride, grads)
        backwards.append(back)
        x, back = batch_norm(net, f"encoder.bn{number}", x, grads)
        backwards.append(back)
        x, back = relu(x)
        backwards.append(back)
    x, back = global_mean(x)
    return x, _chain([*backwards, back])


def head(net: Network, name: str, x: Array, grads: Gradients) -> tuple[Array, Backward]:
    """Projector or predictor."""
    x, back1 = linear(net, f"{name}.linear1", x, grads)
    x, back2 = batch_norm(net, f"{name}.bn", x, grads)
    x, back3 = relu(x)
    x, back4 = linear(net, f"{name}.linear2", x, grads)
    return x, _chain([back1, back2, back3, back4])


def predict(net: Network, view: Array, grads: Gradients) -> tuple[Array, Backward]:
    """The online network: encoder, projector, predictor."""
    features, back1 = encoder(net, view, grads)
    projection, back2 = head(net, "projector", features, grads)
    prediction, back3 = head(net, "predictor", projection, grads)
    return prediction, _chain([back1, back2, back3])


def project(net: Network, view: Array) -> Array:
    """The target network: encoder and projector, in train mode; nobody asks for its gradient."""
    unused: Gradients = {}
    return head(net, "projector", encoder(net, view, unused)[0], unused)[0]


def loss_and_gradients(online: Network, target: Network, view1: Array, view2: Array) -> tuple[float, Gradients]:
    """BYOL's loss and its gradient with respect to the online parameters; moves the buffers of both networks.

    Each view passes each network on its own, view 1 first: batch statistics are those of one view, and the running
    statistics move twice.
    """
    grads: Gradients = {}
    p1, back1 = predict(online, view1, grads)
    p2, back2 = predict(online, view2, grads)
    z1, z2 = project(target, view1), project(target, view2)
    back1(regression_loss_gradient(p1, z2))
    back2(regression_loss_gradient(p2, z1))
    return byol_loss(p1, p2, z1, z2), grads


def init_network(
    rng: np.random.Generator, channels: tuple[int, int, int], hidden: int, projection: int, *, predictor: bool
) -> Network:
    """Random parameters of sizes that keep every layer's output of order one; norms away from their neutral 1 and 0."""
    parameters: dict[str, Array] = {}
    buffers: dict[str, Array] = {}

    def weight(name: str, *shape: int) -> None:
        parameters[f"{name}.weight"] = rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))

    def bias(name: str, size: int) -> None:
        parameters[f"{name}.bias"] = 0.3 * rng.normal(size=size)

    def norm(name: str, size: int) -> None:
        parameters[f"{name}.weight"] = rng.uniform(0.6, 1.6, size=size)
        bias(name, size)
        buffers[f"{name}.running_mean"] = np.zeros(size)
        buffers[f"{name}.running_var"] = np.ones(size)
        buffers[f"{name}.num_batches_tracked"] = np.zeros(())

    for number in (1, 2):
        weight(f"encoder.conv{number}", channels[number], channels[number - 1], 3, 3)
        norm(f"encoder.bn{number}", channels[number])
    sizes = {"projector": channels[2]} | ({"predictor": projection} if predictor else {})
    for name, size in sizes.items():
        weight(f"{name}.linear1", hidden, size)
        bias(f"{name}.linear1", hidden)
        norm(f"{name}.bn", hidden)
        weight(f"{name}.linear2", projection, hidden)
    return Network(parameters, buffers)


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a run, as far as its numbers depend on them."""

    total_steps: int
    warmup_steps: int
    base_lr: float
    batch_size: int
    tau_base: float
    momentum: float
    weight_decay: float
    trust_coefficient: float


@dataclass
class Training:
    """A run: both networks and the momentum buffers; `step` does one optimizer step of it."""

    online: Network
    target: Network
    settings: Hyperparameters
    momentum_buffers: dict[str, Array] = field(default_factory=dict)
    gradients: Mapping[str, Array] = field(default_factory=dict)

    def step(self, step: int, view1: Array, view2: Array) -> float:
        """Forward, backward, LARS at `lr(step)`, then the target's parameters by `tau(step)`; returns the loss."""
        s = self.settings
        loss, self.gradients = loss_and_gradients(self.online, self.target, view1, view2)
        rate = lr(step, s.total_steps, s.warmup_steps, s.base_lr, s.batch_size)
        for name, parameter in self.online.parameters.items():
            buffer = self.momentum_buffers.get(name, np.zeros_like(parameter))
            self.online.parameters[name], self.momentum_buffers[name] = lars_update(
                parameter,
                self.gradients[name],
                buffer,
                lr=rate,
                momentum=s.momentum,
                weight_decay=s.weight_decay,
                trust_coefficient=s.trust_coefficient,
            )
        decay = tau(step, s.total_steps, s.tau_base)
        for name, parameter in self.target.parameters.items():  # parameters only: buffers are the target's own
            self.target.parameters[name] = ema(parameter, self.online.parameters[name], decay)
        return loss
