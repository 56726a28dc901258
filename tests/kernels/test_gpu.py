"""Tests that need a GPU: CUDA graphs, no host sync, few launches. Others run there by the `device` fixture."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from byol_kernels import LARS, byol_loss, byol_loss_with_stats, ema_update_
from tests.gpu import DEVICE, NOT_HERE, REHEARSING, Captured, aside, host_syncs_are_errors, launches, synchronize
from tests.kernels.numerics import randn
from tests.kernels.test_ema import small_resnet
from tests.kernels.test_lars import set_gradients

pytestmark = pytest.mark.gpu("launches")


@pytest.fixture
def quartet() -> list[Tensor]:
    p1, p2, z1, z2 = (randn((256, 256), seed, torch.bfloat16, device=DEVICE) for seed in range(4))
    return [p1.requires_grad_(), p2.requires_grad_(), z1, z2]


def network() -> tuple[list[nn.Parameter], list[Tensor]]:
    online, target = (small_resnet(seed, True, DEVICE) for seed in (0, 1))
    return list(online.parameters()), [p.detach() for p in target.parameters()]


def test_loss_and_backward_are_one_launch_each(quartet: list[Tensor]) -> None:
    p_local = randn((6, 256, 256), 4, torch.bfloat16, device=DEVICE).requires_grad_()
    torch.use_deterministic_algorithms(False)  # it fills every torch.empty, which is a launch each
    for inputs in (quartet, [*quartet, p_local]):
        assert launches(partial(byol_loss, *inputs)) in (["_normalized_mse_fwd_kernel"], NOT_HERE)
        assert launches(partial(byol_loss_with_stats, *inputs)) in (["_normalized_mse_fwd_kernel"], NOT_HERE)
        loss, upstream = byol_loss(*inputs), torch.ones((), device=DEVICE)
        predictions = [*inputs[:2], *inputs[4:]]
        backward = launches(partial(torch.autograd.grad, loss, predictions, upstream, retain_graph=True))
        assert backward in (["_normalized_mse_bwd_kernel"], NOT_HERE)


def test_ema_is_one_launch_and_lars_two() -> None:
    params, targets = network()
    torch.use_deterministic_algorithms(False)
    tau = torch.tensor(0.99, device=DEVICE)
    assert launches(lambda: ema_update_(targets, params, tau)) in (["_ema_update_kernel"], NOT_HERE)
    set_gradients(params, 0)
    optimizer = LARS(params, torch.tensor(0.1, device=DEVICE))
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    for found_inf in (None, torch.zeros((), device=DEVICE)):
        optimizer.found_inf = found_inf
        names = launches(lambda: optimizer.step(ema=(targets, tau), copies=copies))
        assert names in (["_lars_norms_kernel", "_lars_apply_kernel"], NOT_HERE)


def test_no_host_sync(quartet: list[Tensor]) -> None:
    params, targets = network()
    lr, tau = torch.tensor(0.1, device=DEVICE), torch.tensor(0.9, device=DEVICE)
    optimizer = LARS(params, lr)
    optimizer.found_inf = torch.zeros((), device=DEVICE)

    def step(seed: int) -> None:
        gradients = [randn(tuple(p.shape), seed + i, device=DEVICE) for i, p in enumerate(params)]
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(g)  # other memory at every step: new tables
        with host_syncs_are_errors():
            loss = byol_loss(*quartet)
            torch.autograd.grad(loss, quartet[:2])
            optimizer.step(ema=(targets, tau))
            ema_update_(targets, params, tau)
            ema_update_(targets, params, 0.5)

    byol_loss(*quartet)  # the first launch of a stream makes its arrival counter
    for seed in range(3):
        step(100 * seed)


def test_captured_step_follows_lr_and_tau(quartet: list[Tensor]) -> None:
    """Loss, backward, LARS and EMA, replayed beside the same steps run eagerly."""
    params, targets = network()
    others, other_targets = copy.deepcopy(params), [t.clone() for t in targets]
    set_gradients(params, 0)
    set_gradients(others, 0)
    lr, tau = torch.tensor(0.1, device=DEVICE), torch.tensor(0.9, device=DEVICE)
    captured, eager = LARS(params, lr, weight_decay=1e-3), LARS(others, lr, weight_decay=1e-3)

    def work() -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        loss, stats = byol_loss_with_stats(*quartet)
        grads = torch.autograd.grad(loss, quartet[:2])
        captured.step(ema=(targets, tau))
        ema_update_(targets, params, tau)
        return loss, tuple(stats), grads

    with aside():
        captured.step(ema=(targets, tau))
        byol_loss(*quartet)
        before = [t.clone() for t in targets]
        ema_update_(targets, params, tau)  # only to warm up: the eager copy does not take this step
        torch._foreach_copy_(targets, before)
    eager.step(ema=(other_targets, tau))

    graph = Captured(work)
    # Tables rebuilt after the capture must not reach into the graph.
    elsewhere, elsewhere_targets = network()
    set_gradients(elsewhere, 5)
    LARS(elsewhere, 0.3).step(ema=(elsewhere_targets, 0.5))

    for step in range(3):
        lr.fill_(0.2 * (step + 1))
        tau.fill_(0.9 + 0.03 * step)
        for p, o in zip(params, others, strict=True):
            assert p.grad is not None and o.grad is not None
            p.grad.mul_(0.5)
            o.grad.mul_(0.5)
        with torch.no_grad():
            quartet[0].mul_(-1.0)
        loss, stats, grads = graph.replay()
        eager.step(ema=(other_targets, tau))
        ema_update_(other_targets, others, tau)
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(targets, other_targets, strict=True))
        expected, expected_stats = byol_loss_with_stats(*quartet)
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected, quartet[:2]), strict=True))


def test_captured_step_skips_nonfinite_gradients() -> None:
    """A replay with one writes nothing but the flag; the next replay steps."""
    params, targets = network()
    set_gradients(params, 0)
    optimizer = LARS(params, torch.tensor(0.1, device=DEVICE))
    found_inf = optimizer.found_inf = torch.zeros((), device=DEVICE)
    with aside():
        optimizer.step(ema=(targets, 0.9))
    graph = Captured(lambda: optimizer.step(ema=(targets, 0.9)))
    written = [*params, *targets, *(optimizer.state[p]["momentum_buffer"] for p in params)]
    for index in (0, 1, -1):  # a convolution, a batch norm's weight, a bias
        grad = params[index].grad
        assert grad is not None
        finite, before = grad.clone(), [x.detach().clone() for x in written]
        grad[(-1,) * grad.dim()] = torch.nan
        graph.replay()
        assert found_inf.item() == 1.0
        assert all(torch.equal(x, b) for x, b in zip(written, before, strict=True))
        grad.copy_(finite)
        found_inf.zero_()
        graph.replay()
        assert found_inf.item() == 0.0
        assert not any(torch.equal(x, b) for x, b in zip(written, before, strict=True))


def test_first_step_within_a_capture_raises() -> None:
    p = nn.Parameter(randn((4, 4), 0, device=DEVICE))
    p.grad = torch.zeros_like(p)
    if REHEARSING:
        pytest.skip("rehearsal: nothing is captured on a CPU")
    with (
        pytest.raises(RuntimeError, match="momentum must exist"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
    ):
        LARS([p], 0.1).step()


def test_loss_on_concurrent_streams(quartet: list[Tensor]) -> None:
    """Each stream has its own arrival counter; sharing one would end a sum early."""
    expected = byol_loss(*quartet)
    streams = [] if REHEARSING else [torch.cuda.Stream() for _ in range(4)]  # type: ignore[no-untyped-call]
    losses = [byol_loss(*quartet)]
    synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(byol_loss(*quartet))
    synchronize()
    assert all(torch.equal(loss, expected) for loss in losses)


def test_loss_beyond_32_bit_offsets() -> None:
    """Offsets beyond 2^31 elements need 64-bit arithmetic."""
    p = torch.randn(300 if REHEARSING else 300_000, 8192, dtype=torch.float16, device=DEVICE)
    z = p.roll(1, 0)
    loss = byol_loss(p, z, p, z).item()  # (p, z) and (z, p): the same rows both ways
    total = 0.0
    for start in range(0, len(p), 10_000):
        rows = slice(start, start + 10_000)
        total += (1 - torch.cosine_similarity(p[rows].float(), z[rows].float())).double().sum().item()
    assert loss == pytest.approx(4 * total / len(p), rel=1e-5)


def test_gradients_allocated_by_the_graph() -> None:
    """As after `zero_grad(set_to_none=True)`: the addresses are known only during the capture."""
    p = nn.Parameter(randn((64, 64), 0, device=DEVICE))
    q = nn.Parameter(p.detach().clone())
    x = randn((64, 64), 1, device=DEVICE)
    captured, eager = LARS([p], 0.1), LARS([q], 0.1)

    def step(parameter: nn.Parameter, optimizer: LARS) -> None:
        optimizer.zero_grad(set_to_none=True)
        (parameter * x).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    with aside():
        step(p, captured)
    captured.zero_grad(set_to_none=True)
    graph = Captured(lambda: step(p, captured))
    step(q, eager)
    for scale in (1.0, -2.0, 0.5):
        x.mul_(scale)
        # Eager steps in between allocate, and rebuild tables, where the graph must not look.
        step(q, eager)
        graph.replay()
        assert torch.equal(p, q)
