"""Derivatives in other modes than the backward pass, and vmap: torch's values, or an error, never zeros."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from byol_kernels import (
    LARS,
    byol_loss,
    byol_loss_with_stats,
    ema_update_,
    gaussian_blur,
    max_pool2d_3x3,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
    photometric,
    resized_crop,
    sample_view_params,
    update_running_stats_,
)
from byol_kernels.augment_params.params import TABLE_COLUMNS
from byol_kernels.loss.reference import differentiable_loss
from tests.kernels.numerics import randn

OPS = torch.ops.byol_kernels
B, D = 5, 7


def make_dual(x: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call, no-any-return]


def one_direction(p: Tensor, z: Tensor, eps: float) -> Tensor:
    return (2 - 2 * (F.normalize(p, dim=1, eps=eps) * F.normalize(z.detach(), dim=1, eps=eps)).sum(1)).mean()


def plain_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, eps: float = 1e-12) -> Tensor:
    return one_direction(p1, z2, eps) + one_direction(p2, z1, eps)


def local_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, loss: Callable[..., Tensor] = byol_loss) -> Tensor:
    return loss(p1, p2, z1, z2, torch.stack([p1.flip(1), p1 * p2]))


def plain_local_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    locals_ = sum(one_direction(p, z, 1e-12) for p in (p1.flip(1), p1 * p2) for z in (z1, z2))
    return (plain_loss(p1, p2, z1, z2) + locals_) / 3


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "byol_loss": (byol_loss, plain_loss),
    "byol_loss_with_stats": (lambda *x, **eps: byol_loss_with_stats(*x, **eps)[0], plain_loss),
    "normalized_mse_loss": (
        lambda p1, p2, z1, z2: normalized_mse_loss(p1, z2) + normalized_mse_loss(p2, z1),
        plain_loss,
    ),
    "normalized_mse_loss_with_stats": (
        lambda p1, p2, z1, z2: normalized_mse_loss_with_stats(p1, z2)[0] + normalized_mse_loss(p2, z1),
        plain_loss,
    ),
    "byol_loss of local views": (local_loss, plain_local_loss),
    "max_pool2d_3x3": (
        lambda *x: max_pool2d_3x3(torch.stack(x)[None]).square().sum(),
        lambda *x: F.max_pool2d(torch.stack(x)[None], 3, 2, 1).square().sum(),
    ),
}


def by_jvp(f: Callable[..., Tensor], *x: Tensor) -> Any:
    return jvp(f, x, tuple(randn((B, D), 9 + i, torch.float64) for i in range(len(x))))


def by_forward_ad(f: Callable[..., Tensor], *x: Tensor) -> Any:
    with forward_ad.dual_level():
        duals = [make_dual(v, randn((B, D), 9 + i, torch.float64)) for i, v in enumerate(x)]
        return tuple(forward_ad.unpack_dual(f(*duals)))  # type: ignore[no-untyped-call]


def by_vmap_of_grad(f: Callable[..., Tensor], *x: Tensor) -> Any:
    return vmap(grad(f))(*(torch.stack([v, 2 * v, v.flip(0)]) for v in x))


def by_backward_through_vmap(f: Callable[..., Tensor], *x: Tensor) -> Any:
    p = torch.stack([x[0], 2 * x[0]]).requires_grad_()
    loss = vmap(f, in_dims=(0, None, None, None))(p, *x[1:])
    return loss.detach(), torch.autograd.grad(loss.square().sum(), p)


def by_vjp_and_grad(f: Callable[..., Tensor], *x: Tensor) -> Any:
    value, pull = vjp(f, *x)  # type: ignore[misc]
    return value, pull(torch.tensor(3.0, dtype=torch.float64)), grad(f, argnums=(0, 1))(*x)


def by_compiled_vmap_of_grad(f: Callable[..., Tensor], *x: Tensor) -> Any:
    return torch.compile(lambda *x: by_vmap_of_grad(f, *x), backend="eager", fullgraph=True)(*x)


MODES: dict[str, Callable[..., Any]] = {
    "jvp": by_jvp,
    "forward_ad": by_forward_ad,
    "jacfwd": lambda f, *x: jacfwd(f, argnums=(0, 1))(*x),
    "jacrev": lambda f, *x: jacrev(f, argnums=(0, 1))(*x),
    "hessian": lambda f, *x: hessian(f)(*x),
    "vmap": lambda f, *x: vmap(f)(*(torch.stack([v, v.flip(0), 3 - v]) for v in x)),
    "vmap of some": lambda f, *x: vmap(f, in_dims=(None, 0, None, 0))(x[0], x[1][None], x[2], x[3][None]),
    "vmap of grad": by_vmap_of_grad,
    "backward through vmap": by_backward_through_vmap,
    "vjp, grad": by_vjp_and_grad,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("function", "plain"), LOSSES.values(), ids=LOSSES)
def test_derivatives_equal_plain_torch(function: Any, plain: Any, mode: Any) -> None:
    x = [randn((B, D), seed, torch.float64) for seed in range(4)]
    torch.testing.assert_close(mode(function, *x), mode(plain, *x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [byol_loss, max_pool2d_3x3])
def test_compiled_transforms_equal_plain_torch(function: Any) -> None:
    function, plain = LOSSES[function.__name__]
    x = [randn((B, D), seed, torch.float64) for seed in range(4)]
    torch.testing.assert_close(
        by_compiled_vmap_of_grad(function, *x), by_vmap_of_grad(plain, *x), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_differentiable_loss_equals_the_operator(dtype: torch.dtype, num_local: int) -> None:
    """Value, statistics and gradient, for equal, zero, short and long rows; the cosine stays within 1."""
    p, z = (randn((8, 33), seed, dtype) for seed in range(2))
    p[0], p[1], p[2], z[3], z[4] = z[0], 0.0, 1e-13, 0.0, 1e18
    leaves = [p.requires_grad_()]
    if num_local:
        leaves.append(torch.stack([p.flip(1), p]).detach().requires_grad_())
    local = leaves[1] if num_local else None
    loss, stats = byol_loss_with_stats(p, z, p.detach(), z, local)
    by_operator = loss, stats.row_loss, stats.mean_cosine, torch.stack([stats.p_std, stats.z_std])
    values = []
    for outputs in (differentiable_loss(p, z, z, p.detach(), local, 1e-12), by_operator):
        gradients = torch.autograd.grad(outputs[0], leaves)
        assert not any(x.requires_grad for x in outputs[1:])
        assert float(outputs[1].min()) >= 0.0
        # Against the length of a row: where the terms of two targets cancel, their roundings are left.
        lengths = [g.double().norm(dim=-1, keepdim=True).clamp_min(1.0) for g in gradients]
        values.append([*(x.detach() for x in outputs), *lengths, *map(torch.div, gradients, lengths)])
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for a, b in zip(*values, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10)


def test_per_sample_gradients_of_a_network() -> None:
    """`functional_call` of a network with our loss behind it, one image at a time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, D)).double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    images, z = randn((B, 3, 8, 8), 0, torch.float64), randn((B, D), 1, torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor, z: Tensor) -> Tensor:
        return normalized_mse_loss(functional_call(net, parameters, (image[None],)), z[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, z)
    for b in range(B):
        expected = torch.autograd.grad(
            one_direction(net(images[b : b + 1]), z[b : b + 1], 1e-12), list(net.parameters())
        )
        for name, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name][b], e, rtol=1e-11, atol=1e-13)


# -------------------------------------------------------------------------------- operators without such a derivative

IMAGES, LEVELS = randn((2, 3, 8, 8), 0), torch.arange(384, dtype=torch.uint8).view(2, 3, 8, 8)
SIGMA, WIDTH = torch.tensor([0.5, 1.0]), torch.tensor([3, 5])
FACTORS, ORDER = torch.full((2, 4), 0.5), torch.arange(4).expand(2, 4)
TABLE = torch.full((len(TABLE_COLUMNS),), 0.5, dtype=torch.float64)
P, Z = randn((4, 6), 0), randn((4, 6), 1)


def ema(online: Tensor) -> Tensor:
    target = torch.zeros_like(IMAGES)
    ema_update_([target], [online], 0.5)
    return target


def lars(gradient: Tensor) -> Tensor:
    p = nn.Parameter(torch.ones_like(P))
    p.grad = gradient
    LARS([p], 0.1).step()
    return p


def direct_ema(online: Tensor) -> Tensor:
    target = torch.zeros_like(IMAGES)
    OPS.ema_update_([target], [online], None, 0.5, [])
    return target


def direct_lars(gradient: Tensor) -> Tensor:
    p, v = torch.ones_like(P), torch.zeros_like(P)
    OPS.lars_step_(
        [p], [gradient], [v], [0], [], [], [], [], [], [], [0], [True],
        [None], [0.1], [0.9], [0.0], [1e-3], None, 1.0, None, None,
    )  # fmt: skip
    return p


WITHOUT: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "gaussian_blur, images": (lambda x: gaussian_blur(x, SIGMA, WIDTH), IMAGES),
    "gaussian_blur, sigma": (lambda s: gaussian_blur(IMAGES, s, WIDTH), SIGMA),
    "photometric, factors": (
        lambda f: photometric(LEVELS, factors=f, order=ORDER, dtype=torch.float32, mean=(0, 0, 0), std=(1, 1, 1)),
        FACTORS,
    ),
    "photometric, sigma": (
        lambda s: photometric(LEVELS, sigma=s, kernel_size=WIDTH, dtype=torch.float32, mean=(0, 0, 0), std=(1, 1, 1)),
        SIGMA,
    ),
    "sample_view_params": (lambda t: sample_view_params(torch.arange(3), torch.tensor(1), t).factors, TABLE),
    "ema_update_": (ema, IMAGES),
    "LARS": (lars, P),
}
DIRECT: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "loss": (lambda p: OPS.normalized_mse_fwd(p, Z, None, None, None, 1e-12, True)[0], P),
    "loss without gradient": (lambda p: OPS.normalized_mse_fwd(p, Z, None, None, None, 1e-12, False)[0], P),
    "loss with statistics": (lambda p: OPS.normalized_mse_stats_fwd(Z, Z, p, Z, None, 1e-12, True)[0], P),
    "loss of local views": (lambda p: OPS.normalized_mse_fwd(Z, Z, Z, Z, p[None], 1e-12, True)[0], P),
    "loss backward": (lambda g: OPS.normalized_mse_bwd(torch.ones(()), g, None, None, P, None, None)[0], P),
    "max_pool2d_3x3": (lambda x: OPS.max_pool2d_3x3_fwd(x)[0], IMAGES),
    "max_pool2d_3x3 backward": (
        lambda dy: OPS.max_pool2d_3x3_bwd(dy, torch.zeros(2, 3, 8, 8, dtype=torch.int8), 16, 16),
        IMAGES,
    ),
}


@pytest.mark.parametrize(("function", "x"), (WITHOUT | DIRECT).values(), ids=WITHOUT | DIRECT)
def test_other_derivatives_are_refused(function: Any, x: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="must"):
        jvp(function, (x,), (x,))
    with pytest.raises(NotImplementedError, match="must"), forward_ad.dual_level():
        function(make_dual(x, x))
    with pytest.raises(NotImplementedError, match="must"):
        grad(lambda x: function(x).sum())(x)


@pytest.mark.parametrize("function", [direct_ema, direct_lars])
def test_updates_in_place_are_refused_when_called_directly(function: Any) -> None:
    x = IMAGES if function is direct_ema else P
    with pytest.raises(NotImplementedError, match="an update in place must be outside"):
        jvp(function, (x,), (x,))
    with pytest.raises(NotImplementedError, match="an update in place must be outside"), forward_ad.dual_level():
        function(make_dual(x, x))


@pytest.mark.parametrize("name", [name for name in WITHOUT if name not in {"ema_update_", "LARS"}])
def test_backward_without_a_derivative_is_refused(name: str) -> None:
    function, x = WITHOUT[name]
    with pytest.raises(RuntimeError, match="must"):
        function(x.clone().requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]


def test_constants_within_forward_mode_are_accepted() -> None:
    """Only tensors that have a tangent are refused."""

    def function(x: Tensor) -> Tensor:
        views = photometric(LEVELS, factors=FACTORS, order=ORDER, dtype=torch.float32)
        return x * (views.sum() + gaussian_blur(IMAGES, SIGMA, WIDTH).sum())

    value = function(torch.tensor(1.0))
    torch.testing.assert_close(jvp(function, (torch.tensor(1.0),), (torch.tensor(2.0),)), (value, 2 * value))
    assert float(grad(function)(torch.tensor(1.0))) == pytest.approx(float(value))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_operators_equals_a_loop() -> None:
    images, levels = randn((3, 2, 3, 8, 8), 1), torch.stack([LEVELS, LEVELS.flip(0), 255 - LEVELS])
    box = torch.tensor([[0, 0, 4, 4], [1, 2, 5, 6]])
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: gaussian_blur(x, SIGMA, WIDTH), images),
        (lambda s: gaussian_blur(IMAGES, s, WIDTH), torch.stack([SIGMA, 2 * SIGMA])),
        (lambda x: resized_crop(x, box, 4), levels),
        (lambda i: sample_view_params(i, torch.tensor(1), TABLE).factors, torch.arange(6).view(3, 2)),
        (lambda p: OPS.normalized_mse_fwd(p, Z, None, None, None, 1e-12, True)[0], torch.stack([P, 2 * Z - P])),
    ]
    for function, x in cases:
        assert torch.equal(vmap(function)(x), torch.stack([function(row) for row in x]))


def test_vmap_of_updates_in_place_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="ema_update_: an update in place must be outside"):
        vmap(ema)(IMAGES[None])
    with pytest.raises(NotImplementedError, match="LARS.step: an update in place must be outside"):
        vmap(lars)(P[None])
    with pytest.raises(RuntimeError, match="byol_kernels::photometric_out"):
        vmap(photometric)(LEVELS[None])


def test_running_statistics_have_no_derivative_as_in_torch() -> None:
    """In forward mode `torch.nn.functional.batch_norm` updates them, and they get no tangent."""
    x, tangent = randn((6, 5), 0, torch.float64), randn((6, 5), 1, torch.float64)
    mean, var = (torch.full((5,), value, dtype=torch.float64) for value in (0.0, 1.0))
    other_mean, other_var = mean.clone(), var.clone()

    def ours(x: Tensor) -> Tensor:
        update_running_stats_([mean], [var], [x.mean(0)[None]], [x.var(0)[None]], [None], [0.1])
        return mean.sum() + var.sum() + x.sum()

    def torchs(x: Tensor) -> Tensor:
        F.batch_norm(x, other_mean, other_var, training=True, momentum=0.1)
        return other_mean.sum() + other_var.sum() + x.sum()

    torch.testing.assert_close(jvp(ours, (x,), (tangent,)), jvp(torchs, (x,), (tangent,)))
    torch.testing.assert_close((mean, var), (other_mean, other_var))
