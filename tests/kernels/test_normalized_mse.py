"""The loss: values, gradients and statistics against float64; the edges; how it behaves as an operator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byol_kernels import (
    LossStats,
    byol_loss,
    byol_loss_with_stats,
    normalized_mse_loss,
    normalized_mse_loss_with_stats,
    reference,
)
from tests.kernels.conftest import INTERPRETED, Record, not_interpreted
from tests.kernels.restatement import TOLERANCES, byol, close, error, f64, make, normalized_mse

SHAPES = {
    "one_element": (1, 1),
    "one_row": (1, 256),
    "one_column": (7, 1),
    "odd": (5, 33),
    "typical": (64, 256),
    "several_tiles_a_program": (16500, 3),
    "wide": (3, 1000),
    "very_wide": (2, 8192),
    "wider_than_the_kernel": (2, 16500),
}
STATS_SHAPES = {**SHAPES, "several_tiles_a_program": (2500, 24), "very_wide": (70, 4100)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """p1, p2, z1, z2; the predictions ask for gradients, and so does z1, to see that it gets none."""
    p1, p2, z1, z2 = (make(shape, seed, dtype).to(device) for seed in range(4))
    return [p1.requires_grad_(), p2.requires_grad_(), z1.requires_grad_(), z2]


@dtypes
@shapes
def test_loss_and_gradient_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    if INTERPRETED and shape[0] > 1000 and dtype != torch.float32:
        pytest.skip("takes long in the interpreter, and the dtype is tested at other shapes")
    p1, p2, z1, z2 = inputs(shape, dtype, device)
    loss = byol_loss(p1, p2, z1, z2)
    (loss * 3.7).backward()  # type: ignore[no-untyped-call]

    expected, grad1, grad2 = byol(p1, p2, z1, z2)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCES[loss.dtype], abs=TOLERANCES[loss.dtype])
    assert z1.grad is None
    for p, grad in ((p1, grad1), (p2, grad2)):
        assert p.grad is not None and p.grad.dtype == dtype
        # With one column the gradient is 0, and what is left over is the difference of two numbers of size 1 / |p|.
        norm = float(np.linalg.norm(grad)) if shape[1] > 1 else float(np.linalg.norm(1 / f64(p))) / shape[0]
        assert float(np.linalg.norm(f64(p.grad) - 3.7 * grad)) <= TOLERANCES[dtype] * 3.7 * norm


@not_interpreted
@pytest.mark.parametrize("rows", ["ordinary", "one_is_zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_that_are_converted_in_blocks(dtype: torch.dtype, rows: str, device: str) -> None:
    """On the CPU; an unusual row in the second block sends the first one the other way, too."""
    p1, p2, z1, z2 = (make((1300, 256), seed, dtype).to(device) for seed in range(4))
    if rows == "one_is_zero":
        p2[1290] = 0.0
    p1.requires_grad_()
    p2.requires_grad_()
    loss = byol_loss(p1, p2, z1, z2)
    grads = torch.autograd.grad(
        loss, [p1, p2], torch.tensor(650.0, device=device)
    )  # small ones are subnormal in float16
    expected, *expected_grads = byol(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    ordinary = torch.arange(1300) != 1290  # the gradient of a zero row is z_hat / eps, an infinity in float16
    for grad, e in zip(grads, expected_grads, strict=True):
        assert close(grad[ordinary], 650.0 * e[ordinary.numpy()])


@dtypes
def test_one_direction_matches_float64(dtype: torch.dtype, device: str) -> None:
    p, z = (make((37, 129), seed, dtype).to(device) for seed in (4, 5))
    p.requires_grad_()
    loss = normalized_mse_loss(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    rows, grad = normalized_mse(f64(p), f64(z))
    assert loss.item() == pytest.approx(rows.mean(), rel=TOLERANCES[loss.dtype])
    assert p.grad is not None and close(p.grad, grad)


def test_symmetric_loss_is_the_sum_of_both_directions(device: str) -> None:
    p1, p2, z1, z2 = inputs((31, 64), torch.float32, device)
    both = byol_loss(p1, p2, z1, z2).item()
    assert both == pytest.approx(normalized_mse_loss(p1, z2).item() + normalized_mse_loss(p2, z1).item(), rel=1e-6)


@dtypes
@pytest.mark.parametrize("shape", STATS_SHAPES.values(), ids=STATS_SHAPES)
def test_statistics_match_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    if INTERPRETED and max(shape) > 2000 and dtype != torch.float32:
        pytest.skip("takes long in the interpreter, and the dtype is tested at other shapes")
    p1, p2, z1, z2 = inputs(shape, dtype, device)
    loss, stats = byol_loss_with_stats(p1, p2, z1, z2)
    (loss * 3.7).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(loss, byol_loss(p1, p2, z1, z2)) or loss.item() == pytest.approx(
        byol_loss(p1, p2, z1, z2).item(), rel=1e-6, abs=1e-6
    )
    _, plain_grad1, _ = byol(p1, p2, z1, z2)
    assert p1.grad is not None
    assert shape[1] == 1 or close(p1.grad, 3.7 * plain_grad1)

    unit = [f64(x) / np.linalg.norm(f64(x), axis=1, keepdims=True) for x in (p1, p2, z2, z1)]
    rows = np.stack([normalized_mse(f64(p1), f64(z2))[0], normalized_mse(f64(p2), f64(z1))[0]])
    # Absolute: a row loss is at most 4, a cosine and a component of a unit vector at most 1.
    tolerance = TOLERANCES[loss.dtype] * 4
    np.testing.assert_allclose(f64(stats.row_loss), rows, atol=tolerance)
    assert float(stats.mean_cosine) == pytest.approx(1 - rows.mean() / 2, abs=tolerance)
    np.testing.assert_allclose(f64(stats.p_std), np.stack([u.std(0) for u in unit[:2]]), atol=tolerance)
    np.testing.assert_allclose(f64(stats.z_std), np.stack([u.std(0) for u in unit[2:]]), atol=tolerance)
    assert not any(x.requires_grad for x in stats)


def test_statistics_of_one_direction(device: str) -> None:
    p, z = make((19, 8), 0).to(device), make((19, 8), 1).to(device)
    loss, stats = normalized_mse_loss_with_stats(p, z)
    assert isinstance(stats, LossStats)
    assert stats.row_loss.shape == (1, 19) and stats.p_std.shape == stats.z_std.shape == (1, 8)
    assert float(stats.row_loss.mean()) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(stats.z_std[0], F.normalize(z, dim=1).std(0, correction=0), rtol=1e-5, atol=1e-7)


def test_collapse_shows_in_the_statistics(device: str) -> None:
    one = make((1, 256), 0).to(device)
    collapsed = one * torch.arange(1, 129, device=device)[:, None]  # one direction at many lengths
    healthy = make((128, 256), 1).to(device)
    _, stats = normalized_mse_loss_with_stats(healthy, collapsed)
    assert float(stats.z_std.mean()) * 16 < 1e-5
    assert 0.95 < float(stats.p_std.mean()) * 16 < 1.05


# -------------------------------------------------------------------------------- edges


def test_rows_of_every_size(device: str) -> None:
    """Zero, below eps, huge, overflowing and ordinary rows in one batch."""
    sizes = [0.0, 1e-15, 1e-6, 1.0, 1e15, 1e25]
    p = make((6, 40), 0) * torch.tensor(sizes)[:, None]
    p, z = p.to(device).requires_grad_(), make((6, 40), 1).to(device)
    loss, stats = normalized_mse_loss_with_stats(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    rows, grad = normalized_mse(f64(p), f64(z))
    rows[5], grad[5] = 2.0, 0.0  # documented: float32 cannot hold the squared norm
    np.testing.assert_allclose(f64(stats.row_loss)[0], rows, rtol=1e-6)
    assert rows[0] == 2.0
    assert p.grad is not None
    for row in range(6):
        assert error(p.grad[row], grad[row]) <= 2e-6, sizes[row]


def test_zero_targets_give_a_finite_loss_and_no_gradient(device: str) -> None:
    p = make((3, 5), 0).to(device).requires_grad_()
    loss = normalized_mse_loss(p, torch.zeros(3, 5, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 2.0
    assert p.grad is not None and not p.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["p", "z"])
def test_nan_and_infinity_reach_the_loss_and_their_own_row_only(bad: float, where: str, device: str) -> None:
    p, z = make((4, 9), 0).to(device), make((4, 9), 1).to(device)
    (p if where == "p" else z)[2, 3] = bad
    p.requires_grad_()
    loss = normalized_mse_loss(p, z)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isnan()
    assert p.grad is not None
    assert p.grad.isnan().any(1).tolist() == [False, False, True, False]


@dtypes
def test_bounds_are_held_exactly(dtype: torch.dtype, device: str) -> None:
    p = make((200, 77), 0, dtype).to(device)
    assert 0.0 <= byol_loss(p, p, p, p).item() <= 1e-6
    assert 8.0 - 1e-5 <= byol_loss(p, p, -p, -p).item() <= 8.0
    _, stats = byol_loss_with_stats(p, p, p, -p)
    assert float(stats.row_loss.min()) >= 0.0 and float(stats.row_loss.max()) <= 4.0


@settings(max_examples=5 if INTERPRETED else 25, deadline=None)
@given(
    batch=st.integers(1, 9),
    dim=st.integers(2, 40),
    scale=st.sampled_from([2.0**-20, 0.25, 3.0, 2.0**20]),
    seed=st.integers(0, 1000),
)
def test_length_does_not_matter_and_gradient_is_tangential(batch: int, dim: int, scale: float, seed: int) -> None:
    p, z = make((batch, dim), seed).requires_grad_(), make((batch, dim), seed + 1)
    scaled = (p.detach() * scale).requires_grad_()
    loss, scaled_loss = normalized_mse_loss(p, z), normalized_mse_loss(scaled, z * scale)
    assert scaled_loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-6)
    (grad,) = torch.autograd.grad(loss, p)
    (scaled_grad,) = torch.autograd.grad(scaled_loss, scaled)
    torch.testing.assert_close(scaled_grad * scale, grad, rtol=1e-4, atol=1e-6)
    # A row's gradient is orthogonal to the row: moving along p does not change its direction.
    assert float((p.detach() * grad).sum(1).abs().max()) < 1e-5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row_strided": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
    "every_other_column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    p1, p2, z1, z2 = inputs((9, 48), dtype, device)
    views = [layout(x.detach()) for x in (p1, p2, z1, z2)]
    assert all(torch.equal(view, x) for view, x in zip(views, (p1, p2, z1, z2), strict=True))
    leaves = [view.requires_grad_() for view in views[:2]]
    loss = byol_loss(*leaves, *views[2:])
    grads = torch.autograd.grad(loss, leaves)
    expected, *expected_grads = byol(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(close(grad, e) for grad, e in zip(grads, expected_grads, strict=True))


def test_expanded_rows(device: str) -> None:
    p, z = make((6, 32), 0).to(device).requires_grad_(), make((1, 32), 1).to(device)
    (grad,) = torch.autograd.grad(normalized_mse_loss(p, z.expand(6, 32)), p)
    assert close(grad, normalized_mse(f64(p), f64(z).repeat(6, 0))[1])


def test_bfloat16_gradient_is_at_most_twice_as_wrong_as_pytorch(device: str) -> None:
    p, z = (make((64, 256), seed, torch.bfloat16).to(device) for seed in (0, 1))
    p.requires_grad_()
    textbook = (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()
    (theirs,) = torch.autograd.grad(textbook, p)
    (ours,) = torch.autograd.grad(normalized_mse_loss(p, z), p)
    expected = normalized_mse(f64(p), f64(z))[1]
    assert error(ours, expected) <= 2 * error(theirs, expected)


def test_float16_gradient_survives_until_the_loss_scale_reaches_it(device: str) -> None:
    """Long predictions of a large batch have gradients below float16's range; the upstream factor lifts them."""
    p, z = make((512, 256), 0, torch.float16).to(device) * 30, make((512, 256), 1, torch.float16).to(device)
    p.requires_grad_()
    (grad,) = torch.autograd.grad(normalized_mse_loss(p, z) * 65536.0, p)
    assert close(grad, 65536.0 * normalized_mse(f64(p), f64(z))[1])


# -------------------------------------------------------------------------------- as an operator


def test_gradient_only_where_asked(device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.float32, device)
    expected = torch.autograd.grad(byol_loss(p1, p2, z1, z2), p2)[0]
    loss = byol_loss(p1.detach(), p2, z1, z2)
    assert torch.equal(torch.autograd.grad(loss, p2)[0], expected)
    with torch.no_grad():
        assert not byol_loss(p1, p2, z1, z2).requires_grad
    assert not byol_loss(p1.detach(), p2.detach(), z1, z2).requires_grad


def test_backward_twice_through_a_kept_graph_gives_the_same(device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.bfloat16, device)
    loss = byol_loss(p1, p2, z1, z2)
    first = torch.autograd.grad(loss, [p1, p2], retain_graph=True)
    second = torch.autograd.grad(loss, [p1, p2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repeats_bit_for_bit(device: str) -> None:
    p1, p2, z1, z2 = inputs((301, 65), torch.float32, device)
    losses = {byol_loss(p1, p2, z1, z2).item() for _ in range(3)}
    assert len(losses) == 1


@pytest.mark.parametrize("wrt", ["p1", "p2"])
def test_second_derivative_is_refused(wrt: str, device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 6), torch.float32, device)
    p = p1 if wrt == "p1" else p2
    (grad,) = torch.autograd.grad(byol_loss(p1, p2, z1, z2), p, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("rows", [3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backward_of_one_loss_gives_the_same(rows: int, dtype: torch.dtype, device: str) -> None:
    """A plain backward may hand out what the forward stored, which must stay as it was stored."""
    p1, p2, z1, z2 = inputs((rows, 256), dtype, device)
    _, *expected = byol(p1, p2, z1, z2)
    loss = byol_loss(p1, p2, z1, z2)
    for scale in (None, None, 3.0, None):
        upstream = None if scale is None else torch.tensor(scale, device=device)
        loss.backward(upstream, retain_graph=True)  # type: ignore[no-untyped-call]
        for p, grad in zip((p1, p2), expected, strict=True):
            assert p.grad is not None and close(p.grad, (scale or 1.0) * grad)
            p.grad.mul_(5.0)
            p.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    loss = byol_loss(p1, p2, z1, z2)
    loss.backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), expected, strict=True):
        assert p.grad is not None and close(p.grad, 2.0 * grad)  # added up


@not_interpreted  # the interpreter cuts off where it converts to bfloat16
def test_a_plain_backward_rounds_once(device: str) -> None:
    p1, p2, z1, z2 = inputs((5, 300), torch.bfloat16, device)
    byol_loss(p1, p2, z1, z2).backward()  # type: ignore[no-untyped-call]
    for p, grad in zip((p1, p2), byol(p1, p2, z1, z2)[1:], strict=True):
        assert p.grad is not None
        equal = p.grad.cpu() == torch.from_numpy(grad).to(torch.bfloat16)
        assert equal.double().mean() > 0.99  # all but those next to the middle between two numbers


def test_autocast_changes_nothing(device: str) -> None:
    p1, p2, z1, z2 = inputs((8, 16), torch.bfloat16, device)
    expected = byol_loss(p1, p2, z1, z2)
    with torch.autocast(device, torch.bfloat16):
        loss = byol_loss(p1, p2, z1, z2)
        full = byol_loss(*(x.detach().float() for x in (p1, p2, z1, z2)))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert full.item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_operator_forward_one_backward_and_no_host_sync(device: str) -> None:
    p1, p2, z1, z2 = inputs((8, 16), torch.float32, device)
    with Record() as record:
        loss = byol_loss(p1, p2, z1, z2)
    assert record.names == ["byol_kernels.normalized_mse_fwd.default"]
    with Record() as record:
        torch.autograd.grad(loss, [p1, p2])
    computing = [name for name in record.names if not name.startswith(("aten.select", "aten.detach", "aten.ones_like"))]
    assert computing == ["byol_kernels.normalized_mse_bwd.default"]


@not_interpreted
def test_reference_passes_gradcheck() -> None:
    p1, p2, z1, z2 = inputs((3, 4), torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda a, b: byol_loss(a, b, z1, z2), (p1, p2))
    assert torch.autograd.gradcheck(lambda a: normalized_mse_loss(a, z2, eps=5.0), (p1,))  # below eps: the other branch


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("stats", [False, True])
def test_operator_checks(dtype: torch.dtype, pairs: int, stats: bool, device: str) -> None:
    p1, p2, z1, z2 = inputs((4, 8), dtype, device)
    args = (p1, z2, p2, z1.detach()) if pairs == 2 else (p1, z2, None, None)
    op = torch.ops.byol_kernels.normalized_mse_stats_fwd if stats else torch.ops.byol_kernels.normalized_mse_fwd
    torch.library.opcheck(op, (*args, 1e-12, True))
    torch.library.opcheck(op, (*args, 1e-12, False))
    grads = [make((4, 8), seed, dtype).to(device) for seed in range(9, 9 + pairs)]
    # Its autograd refuses on purpose, so the check that differentiates it is left out.
    torch.library.opcheck(
        torch.ops.byol_kernels.normalized_mse_bwd,
        (torch.tensor(2.0, device=device), grads[0], grads[1] if pairs == 2 else None, p1, p2 if pairs == 2 else None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@not_interpreted
def test_compiles_without_graph_breaks(device: str) -> None:
    p1, p2, z1, z2 = inputs((16, 32), torch.float32, device)

    def step(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        return byol_loss(p1, p2, z1, z2)

    compiled = torch.compile(step, fullgraph=True)
    loss, expected = compiled(p1, p2, z1, z2), step(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(loss, [p1, p2]), torch.autograd.grad(expected, [p1, p2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
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
    "stats": (lambda: byol_loss_with_stats(*(torch.ones(n, 3) for n in (2, 3, 2, 2))), "byol_loss_with_stats: p2"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_low_precision_is_computed_in_float32(device: str) -> None:
    """Whatever comes in, the CPU path rounds only its outputs."""
    p1, p2, z1, z2 = (x.detach() for x in inputs((6, 10), torch.bfloat16, device))
    for function in (reference.normalized_mse_fwd, reference.normalized_mse_stats_fwd):
        low = function(p1, z2, p2, z1, 1e-12, True)
        full = function(p1.float(), z2.float(), p2.float(), z1.float(), 1e-12, True)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(low, full, strict=True))
