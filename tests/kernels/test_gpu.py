"""What only a GPU can show: CUDA graphs, no host sync, few launches. Other tests run there by the `device` fixture."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_kernels import LARS, byol_loss, byol_loss_with_stats, ema_update_
from tests.kernels.restatement import make
from tests.kernels.test_ema import small_resnet
from tests.kernels.test_lars import set_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@contextmanager
def host_syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call starts on the GPU; copies of tables and fills included."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() or [] if str(event.device_type).endswith("CUDA")]


@pytest.fixture
def quartet() -> list[Tensor]:
    p1, p2, z1, z2 = (make((256, 256), seed, torch.bfloat16, device="cuda") for seed in range(4))
    return [p1.requires_grad_(), p2.requires_grad_(), z1, z2]


def network() -> tuple[list[nn.Parameter], list[Tensor]]:
    online, target = (small_resnet(seed, True, "cuda") for seed in (0, 1))
    return list(online.parameters()), [p.detach() for p in target.parameters()]


def test_loss_is_one_launch_and_its_backward_another(quartet: list[Tensor]) -> None:
    p1, p2, z1, z2 = quartet
    torch.use_deterministic_algorithms(False)  # it fills every torch.empty, which is a launch each
    assert launches(lambda: byol_loss(p1, p2, z1, z2)) == ["_normalized_mse_fwd_kernel"]
    assert launches(lambda: byol_loss_with_stats(p1, p2, z1, z2)) == ["_normalized_mse_fwd_kernel"]
    loss, upstream = byol_loss(p1, p2, z1, z2), torch.ones((), device="cuda")
    backward = launches(lambda: torch.autograd.grad(loss, [p1, p2], upstream, retain_graph=True))
    assert backward == ["_normalized_mse_bwd_kernel"]


def test_ema_is_one_launch_and_lars_two() -> None:
    params, targets = network()
    torch.use_deterministic_algorithms(False)
    tau = torch.tensor(0.99, device="cuda")
    assert launches(lambda: ema_update_(targets, params, tau)) == ["_ema_update_kernel"]
    set_gradients(params, 0)
    optimizer = LARS(params, torch.tensor(0.1, device="cuda"))
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    names = launches(lambda: optimizer.step(ema=(targets, tau), copies=copies))
    assert names == ["_lars_norms_kernel", "_lars_apply_kernel"]


def test_nothing_waits_for_the_device(quartet: list[Tensor]) -> None:
    params, targets = network()
    lr, tau = torch.tensor(0.1, device="cuda"), torch.tensor(0.9, device="cuda")
    optimizer = LARS(params, lr)

    def step(seed: int) -> None:
        gradients = [make(tuple(p.shape), seed + i, device="cuda") for i, p in enumerate(params)]
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(g)  # other memory at every step: new tables
        with host_syncs_are_errors():
            loss = byol_loss(*quartet)
            torch.autograd.grad(loss, quartet[:2])
            optimizer.step(ema=(targets, tau))
            ema_update_(targets, params, tau)
            ema_update_(targets, params, 0.5)

    byol_loss(*quartet)  # the first launch of a stream makes its ticket counter
    for seed in range(3):
        step(100 * seed)


def test_a_captured_step_follows_lr_and_tau(quartet: list[Tensor]) -> None:
    """The whole of what a trainer captures, replayed beside the same steps run eagerly."""
    params, targets = network()
    others, other_targets = copy.deepcopy(params), [t.clone() for t in targets]
    set_gradients(params, 0)
    set_gradients(others, 0)
    lr, tau = torch.tensor(0.1, device="cuda"), torch.tensor(0.9, device="cuda")
    captured, eager = LARS(params, lr, weight_decay=1e-3), LARS(others, lr, weight_decay=1e-3)

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step(ema=(targets, tau))
        byol_loss(*quartet)
        before = [t.clone() for t in targets]
        ema_update_(targets, params, tau)  # only to warm up: the eager copy does not take this step
        torch._foreach_copy_(targets, before)
    torch.cuda.current_stream().wait_stream(side)
    eager.step(ema=(other_targets, tau))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, stats = byol_loss_with_stats(*quartet)
        grads = torch.autograd.grad(loss, quartet[:2])
        captured.step(ema=(targets, tau))
        ema_update_(targets, params, tau)
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
        graph.replay()
        eager.step(ema=(other_targets, tau))
        ema_update_(other_targets, others, tau)
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(targets, other_targets, strict=True))
        expected, expected_stats = byol_loss_with_stats(*quartet)
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected, quartet[:2]), strict=True))


def test_first_step_within_a_capture_is_refused() -> None:
    p = nn.Parameter(make((4, 4), 0, device="cuda"))
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="momentum must exist"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        LARS([p], 0.1).step()


def test_loss_on_several_streams_at_once(quartet: list[Tensor]) -> None:
    """Each stream has a ticket counter of its own; sharing one would end a sum early."""
    expected = byol_loss(*quartet)
    streams = [torch.cuda.Stream() for _ in range(4)]  # type: ignore[no-untyped-call]
    losses = []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(byol_loss(*quartet))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for loss in losses)


def test_large_batch_of_long_rows() -> None:
    """Offsets beyond 2^31 elements need 64-bit arithmetic."""
    p = torch.randn(300_000, 8192, dtype=torch.float16, device="cuda")
    z = p.roll(1, 0)
    loss = byol_loss(p, z, p, z).item()  # (p, z) and (z, p): the same rows both ways
    total = 0.0
    for start in range(0, len(p), 10_000):
        rows = slice(start, start + 10_000)
        total += (1 - torch.cosine_similarity(p[rows].float(), z[rows].float())).double().sum().item()
    assert loss == pytest.approx(4 * total / len(p), rel=1e-5)


def test_gradients_that_the_graph_allocates() -> None:
    """As after `zero_grad(set_to_none=True)`: the addresses are known only during the capture."""
    p = nn.Parameter(make((64, 64), 0, device="cuda"))
    q = nn.Parameter(p.detach().clone())
    x = make((64, 64), 1, device="cuda")
    captured, eager = LARS([p], 0.1), LARS([q], 0.1)

    def step(parameter: nn.Parameter, optimizer: LARS) -> None:
        optimizer.zero_grad(set_to_none=True)
        (parameter * x).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(p, captured)
    torch.cuda.current_stream().wait_stream(side)
    captured.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(p, captured)
    step(q, eager)
    for scale in (1.0, -2.0, 0.5):
        x.mul_(scale)
        # Eager steps in between allocate, and rebuild tables, where the graph must not look.
        step(q, eager)
        graph.replay()
        assert torch.equal(p, q)
