"""The loss as an operator of torch: autograd, compilation, checks of its arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from byol_kernels import byol_loss, byol_loss_with_stats, normalized_mse_loss
from byol_kernels.loss import reference
from tests.kernels.conftest import INTERPRETED, Record, not_interpreted
from tests.kernels.numerics import byol_loss_and_grads, is_close, loss_inputs, randn

pytestmark = pytest.mark.usefixtures("few_loss_programs")


def test_gradient_only_where_required(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((4, 6), torch.float32, device)
    expected = torch.autograd.grad(byol_loss(p1, p2, z1, z2), p2)[0]
    loss = byol_loss(p1.detach(), p2, z1, z2)
    assert torch.equal(torch.autograd.grad(loss, p2)[0], expected)
    with torch.no_grad():
        assert not byol_loss(p1, p2, z1, z2).requires_grad
    assert not byol_loss(p1.detach(), p2.detach(), z1, z2).requires_grad


def test_second_backward_through_retained_graph_is_equal(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((4, 6), torch.bfloat16, device)
    loss = byol_loss(p1, p2, z1, z2)
    first = torch.autograd.grad(loss, [p1, p2], retain_graph=True)
    second = torch.autograd.grad(loss, [p1, p2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@not_interpreted  # programs run one after the other there
def test_loss_is_bit_reproducible(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((301, 65), torch.float32, device)
    losses = {byol_loss(p1, p2, z1, z2).item() for _ in range(3)}
    assert len(losses) == 1


@pytest.mark.parametrize("wrt", ["p1", "p2", "p_local"])
def test_second_derivative_is_refused(wrt: str, device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((4, 6), torch.float32, device)
    p_local = randn((2, 4, 6), 4).to(device).requires_grad_()
    p = {"p1": p1, "p2": p2, "p_local": p_local}[wrt]
    loss = byol_loss(p1, p2, z1, z2, p_local if wrt == "p_local" else None)
    (grad,) = torch.autograd.grad(loss, p, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("rows", [3] if INTERPRETED else [3, 400])  # the CPU path takes 400 another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_leaves_stored_gradient_unchanged(rows: int, dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((rows, 256), dtype, device)
    _, *expected = byol_loss_and_grads(p1, p2, z1, z2)
    loss = byol_loss(p1, p2, z1, z2)
    for scale in (None, None, 3.0, None):
        upstream = None if scale is None else torch.tensor(scale, device=device)
        loss.backward(upstream, retain_graph=True)  # type: ignore[no-untyped-call]
        for p, grad in zip((p1, p2), expected, strict=True):
            assert p.grad is not None and is_close(p.grad, (scale or 1.0) * grad)
            p.grad.mul_(5.0)
            p.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    loss = byol_loss(p1, p2, z1, z2)
    loss.backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), expected, strict=True):
        assert p.grad is not None and is_close(p.grad, 2.0 * grad)  # added up


@not_interpreted  # the interpreter cuts off where it converts to bfloat16
def test_plain_backward_rounds_once(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((5, 300), torch.bfloat16, device)
    byol_loss(p1, p2, z1, z2).backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), byol_loss_and_grads(p1, p2, z1, z2)[1:], strict=True):
        assert p.grad is not None
        equal = p.grad.cpu() == torch.from_numpy(grad).to(torch.bfloat16)
        assert equal.double().mean() > 0.99  # all but those next to the middle between two numbers


def test_loss_ignores_autocast(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((8, 16), torch.bfloat16, device)
    expected = byol_loss(p1, p2, z1, z2)
    with torch.autocast(device, torch.bfloat16):
        loss = byol_loss(p1, p2, z1, z2)
        full = byol_loss(*(x.detach().float() for x in (p1, p2, z1, z2)))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert full.item() == pytest.approx(expected.item(), rel=1e-6)


def test_forward_and_backward_are_one_operator_each(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((8, 16), torch.float32, device)
    p_local = randn((3, 8, 16), 4).to(device).requires_grad_()
    for predictions in ([p1, p2], [p1, p2, p_local]):
        with Record() as record:
            loss = byol_loss(p1, p2, z1, z2, *predictions[2:])
        assert record.names == ["byol_kernels.normalized_mse_fwd.default"]
        with Record() as record:
            torch.autograd.grad(loss, predictions)
        free = ("aten.select", "aten.detach", "aten.ones_like")
        computing = [name for name in record.names if not name.startswith(free)]
        assert computing == ["byol_kernels.normalized_mse_bwd.default"]


@not_interpreted
def test_cpu_gradient_passes_gradcheck() -> None:
    p1, p2, z1, z2 = loss_inputs((3, 4), torch.float64, "cpu")
    p_local = randn((2, 3, 4), 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: byol_loss(a, b, z1, z2), (p1, p2))
    assert torch.autograd.gradcheck(lambda a, b, c: byol_loss(a, b, z1, z2, c), (p1, p2, p_local))
    assert torch.autograd.gradcheck(lambda c: byol_loss_with_stats(p1, p2, z1, z2, c)[0], (p_local,))
    # Below eps: the other branch.
    assert torch.autograd.gradcheck(lambda a: normalized_mse_loss(a, z2, eps=5.0), (p1,))
    assert torch.autograd.gradcheck(lambda c: byol_loss(p1, p2, z1, z2, c, eps=5.0), (p_local,))


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("stats", [False, True])
def test_operator_checks(dtype: torch.dtype, views: int, stats: bool, device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((4, 8), dtype, device)
    p_local = randn((2, 4, 8), 4, dtype).to(device).requires_grad_() if views == 4 else None
    args = (p1, z2, None, None, None) if views == 1 else (p1, z2, p2, z1.detach(), p_local)
    op = torch.ops.byol_kernels.normalized_mse_stats_fwd if stats else torch.ops.byol_kernels.normalized_mse_fwd
    torch.library.opcheck(op, (*args, 1e-12, True))
    torch.library.opcheck(op, (*args, 1e-12, False))
    predictions = [p1, None if views == 1 else p2, p_local]
    grads = [None if p is None else randn(tuple(p.shape), 9 + i, dtype).to(device) for i, p in enumerate(predictions)]
    # Its autograd refuses on purpose, so the check that differentiates it is left out.
    torch.library.opcheck(
        torch.ops.byol_kernels.normalized_mse_bwd,
        (torch.tensor(2.0, device=device), *grads, *predictions),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@not_interpreted
def test_compiles_with_fullgraph(device: str) -> None:
    p1, p2, z1, z2 = loss_inputs((16, 32), torch.float32, device)
    p_local = randn((2, 16, 32), 4).to(device).requires_grad_()

    def step(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor) -> tuple[Tensor, Tensor]:
        return byol_loss(p1, p2, z1, z2), byol_loss(p1, p2, z1, z2, p_local)

    compiled = torch.compile(step, fullgraph=True)
    losses, all_expected = (f(p1, p2, z1, z2, p_local) for f in (compiled, step))
    for loss, expected in zip(losses, all_expected, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads, expected_grads = (torch.autograd.grad(x[0] + 3 * x[1], [p1, p2, p_local]) for x in (losses, all_expected))
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


_ROWS = torch.ones(2, 3)
INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    "three_dimensions": (
        lambda: normalized_mse_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
        r"p_BD must be \[batch",
    ),
    "empty_batch": (lambda: normalized_mse_loss(torch.ones(0, 4), torch.ones(0, 4)), "at least one row"),
    "no_columns": (lambda: normalized_mse_loss(torch.ones(4, 0), torch.ones(4, 0)), "at least one row and one column"),
    "integers": (lambda: normalized_mse_loss(torch.ones(2, 3).int(), torch.ones(2, 3).int()), r"got torch\.int32"),
    "shapes": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 4)), r"\(2, 3\), got \(2, 4\)"),
    "broadcast": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(1, 3)), "must have the shape of p_BD"),
    "dtypes": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3).half()),
        r"convert it with \.to\(torch.float32",
    ),
    "devices": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3, device="meta")),
        "on the device of p_BD",
    ),
    "eps": (lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3), eps=0.0), "eps must be positive"),
    "eps_nan": (
        lambda: normalized_mse_loss(torch.ones(2, 3), torch.ones(2, 3), eps=float("nan")),
        "eps must be positive",
    ),
    "second_pair": (
        lambda: byol_loss(*(torch.ones(2, n) for n in (3, 3, 3, 5))),
        "byol_loss: z2 must have the shape of p1",
    ),
    "no_local_views": (
        lambda: byol_loss(_ROWS, _ROWS, _ROWS, _ROWS, torch.ones(0, 2, 3)),
        r"byol_loss: p_local must be \[K, 2, 3\], K of 1 or more .*, got \(0, 2, 3\)",
    ),
    "one_local_view_of_two_dimensions": (
        lambda: byol_loss(_ROWS, _ROWS, _ROWS, _ROWS, _ROWS),
        r"p_local must be .*, got \(2, 3\); stack one prediction per local view",
    ),
    "batch_of_local_views": (
        lambda: byol_loss_with_stats(_ROWS, _ROWS, _ROWS, _ROWS, torch.ones(2, 3, 3)),
        r"byol_loss_with_stats: p_local must be \[K, 2, 3\]",
    ),
    "dtype_of_local_views": (
        lambda: byol_loss(_ROWS, _ROWS, _ROWS, _ROWS, torch.ones(2, 2, 3).half()),
        "p_local must have the dtype of p1",
    ),
    "device_of_local_views": (
        lambda: byol_loss(_ROWS, _ROWS, _ROWS, _ROWS, torch.ones(2, 2, 3, device="meta")),
        "p_local must be on the device of p1",
    ),
    "stats": (lambda: byol_loss_with_stats(*(torch.ones(n, 3) for n in (2, 3, 2, 2))), "byol_loss_with_stats: p2"),
}


@pytest.mark.parametrize(("call", "message"), INVALID.values(), ids=INVALID)
def test_invalid_input_raises(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_low_precision_is_computed_in_float32(device: str) -> None:
    """Whatever comes in, the CPU path rounds only its outputs."""
    p1, p2, z1, z2 = (x.detach() for x in loss_inputs((6, 10), torch.bfloat16, device))
    p_local = torch.stack([p1.flip(0), p2.flip(1)])
    for function in (reference.normalized_mse_fwd, reference.normalized_mse_stats_fwd):
        low = function(p1, z2, p2, z1, p_local, 1e-12, True)
        full = function(p1.float(), z2.float(), p2.float(), z1.float(), p_local.float(), 1e-12, True)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(low, full, strict=True))
