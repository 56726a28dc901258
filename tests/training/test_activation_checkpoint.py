"""Activations that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from byol_fast.config.fields import ViewBatching
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.byol import BYOL
from byol_fast.models.first_pass import MAX_CHANGES
from byol_fast.models.split_batchnorm_layers import num_splits
from byol_fast.utils.precision import Precision
from tests.training.helpers import BF16, FP32, batches, small_byol, train_step


@pytest.mark.parametrize("views", ["batched", "separate"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_recomputed_activations_change_nothing(views: ViewBatching, precision: Precision) -> None:
    """Weights and running statistics: nothing is counted twice, and blocks are computed again with the same weights."""
    data = batches(3)
    states = []
    for recompute in (False, True):
        model = small_byol(views)
        if recompute:
            assert checkpoint_blocks(model.encoder) == 8  # residual blocks of a ResNet-18
        step = train_step(model, precision=precision)
        assert (step.lowp_weights is not None) == (precision is BF16)
        losses = [float(step(batch, k).loss) for k, batch in enumerate(data)]
        states.append((losses, model.state_dict()))
    (losses_a, a), (losses_b, b) = states
    assert losses_a == losses_b
    assert all(torch.equal(a[name], b[name]) for name in a)


class Norm(nn.BatchNorm2d):
    """A batch norm with a forward of its own: no step collects its statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return 1.5 * y


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("views", "norm"),
    [
        ("batched", lambda: nn.InstanceNorm2d(8, track_running_stats=True)),  # stacked views are not for it
        ("batched", lambda: nn.Sequential(spectral_norm(nn.Conv2d(8, 8, 1)), nn.InstanceNorm2d(8))),
        ("separate", lambda: Norm(8)),
        ("concat", lambda: Norm(8)),
    ],
    ids=["instance norm", "spectral norm", "own forward", "own forward, concat"],
)
def test_norms_that_stay_torchs_are_counted_once_where_activations_are_computed_again(
    views: Any, norm: Callable[[], nn.Module]
) -> None:
    (batch,) = batches(1)
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        blocks = nn.Sequential(Block(norm()), Block(nn.BatchNorm2d(8)))
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), blocks, nn.AdaptiveAvgPool2d(1))
        model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=32, view_batching=views)
        assert (model.not_batched_reason is not None) == (views == "batched")
        if recompute:
            assert checkpoint_blocks(model.encoder) == 2
        train_step(model)(batch, 0)
        states.append(model.state_dict())
    for name, a in states[0].items():
        assert torch.equal(a, states[1][name]), name


def test_recomputation_keeps_less_for_the_backward_pass() -> None:
    """Bytes that autograd holds on to, counted as it packs them."""
    (batch,) = batches(1)

    def kept(recompute: bool) -> int:
        model = small_byol()
        if recompute:
            checkpoint_blocks(model.encoder)
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model.forward_train(batch.views[0], batch.views[1])
        del output
        return sum(seen.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    assert kept(True) < 0.7 * kept(False)


class Scaled(nn.Module):
    """A block with an option."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * self.conv(x)  # type: ignore[no-any-return]


def test_recomputed_blocks_are_called_as_before() -> None:
    """With options, and by a forward that was set on the block itself."""
    first, second = Scaled(), Scaled()
    second.forward = first.forward  # type: ignore[method-assign]
    x = torch.randn(2, 3, 4, 4)
    expected = first(first(x, factor=3.0), factor=3.0)
    checkpoint_blocks(nn.Sequential(first, second))
    result = second(first(x, factor=3.0), factor=3.0)
    assert torch.equal(result, expected)
    gradients = [torch.autograd.grad(y.sum(), first.conv.weight)[0] for y in (result, expected)]
    assert torch.equal(*gradients)


def test_an_encoder_without_blocks_cannot_be_recomputed() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing: the encoder must have blocks"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


# ------------------------------------------------------------------ encoders that checkpoint by themselves


class OwnCheckpoints(nn.Module):
    """Blocks that the encoder itself checkpoints: each, or the last ones within a checkpoint of all."""

    def __init__(self, form: str | None, *, reentrant: bool = False, num_passes: int = 1) -> None:
        super().__init__()
        self.form, self.reentrant = form, reentrant
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList([Block(nn.BatchNorm2d(8)) for _ in range(3)])
        self.num_passes = num_passes

    def forward(self, x: Tensor) -> Tensor:
        x, blocks = self.stem(x), list(self.blocks) * self.num_passes
        if self.form is None:
            x = in_order(blocks, x)
        elif self.form == "each":
            for block in blocks:
                x = self._checkpoint(block, x)
        else:
            x = self._checkpoint(lambda y: self._checkpoint(lambda z: in_order(blocks[1:], z), blocks[0](y)), x)
        return x.mean((2, 3))

    def _checkpoint(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y: Tensor = checkpoint(function, x, use_reentrant=self.reentrant)
        return y


def in_order(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def double_byol(form: str | None, views: ViewBatching = "batched", **options: Any) -> BYOL:
    torch.manual_seed(0)
    encoder = OwnCheckpoints(form, **options)
    return BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=16, view_batching=views).double()


def one_pass(model: BYOL, a: Tensor, _: Tensor) -> None:
    model.forward_train(*a).loss.backward()  # type: ignore[no-untyped-call]


def two_passes(model: BYOL, a: Tensor, b: Tensor) -> None:
    (model.forward_train(*a).loss + model.forward_train(*b).loss).backward()  # type: ignore[no-untyped-call]


def two_shapes(model: BYOL, a: Tensor, b: Tensor) -> None:
    (model.forward_train(*a).loss + model.forward_train(*b[:, :4]).loss).backward()  # type: ignore[no-untyped-call]


def call_before(model: BYOL, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        model.encoder(b.flatten(0, 1))  # the same shape, as one view
    one_pass(model, a, b)


def call_between(model: BYOL, a: Tensor, b: Tensor) -> None:
    loss = model.forward_train(*a).loss
    with torch.no_grad():
        model.encoder(b.flatten(0, 1))
    loss.backward()  # type: ignore[no-untyped-call]


def evaluation_between(model: BYOL, a: Tensor, b: Tensor) -> None:
    loss = model.forward_train(*a).loss
    with torch.no_grad():
        model.eval()(*b)
    model.train()
    loss.backward()  # type: ignore[no-untyped-call]


def supervised_loss_beside(model: BYOL, a: Tensor, b: Tensor) -> None:
    (model.forward_train(*a).loss + model.encoder(b.flatten(0, 1)).square().mean()).backward()


def older_pass_first(model: BYOL, a: Tensor, b: Tensor) -> None:
    losses = [model.encoder(b.flatten(0, 1)).square().mean(), model.forward_train(*a).loss]
    for loss in losses:
        loss.backward()


PASSES = [
    one_pass,
    two_passes,
    two_shapes,
    call_before,
    call_between,
    evaluation_between,
    supervised_loss_beside,
    older_pass_first,
]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("form", ["each", "nested"])
@pytest.mark.parametrize("passes", PASSES)
def test_own_checkpoints_of_an_encoder_change_nothing(
    passes: Callable[[BYOL, Tensor, Tensor], None], form: str, reentrant: bool
) -> None:
    a, b = torch.randn(2, 2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = [double_byol(None), double_byol(form, reentrant=reentrant)]
    for model in models:
        assert model.view_batching == "batched"
        passes(model, a, b)
    same_gradients_and_buffers(*models)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    ("views", "num_passes"), [("separate", 1), ("concat", 1), ("batched", 2)], ids=["separate", "concat", "shared"]
)
def test_norms_of_one_view_are_counted_once_where_an_encoder_checkpoints(
    views: ViewBatching, num_passes: int, reentrant: bool
) -> None:
    """Blocks that are called twice update their statistics in another order when stacked: they pass separately."""
    a = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = [double_byol(form, views, reentrant=reentrant, num_passes=num_passes) for form in (None, "each")]
    for model in models:
        assert model.view_batching == ("separate" if num_passes == 2 else views)
        one_pass(model, a, a)
    same_gradients_and_buffers(*models)


def same_gradients_and_buffers(expected: BYOL, model: BYOL) -> None:
    for (name, p), q in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.startswith("target"), name
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad)), name
    for (name, a), b in zip(expected.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_own_checkpoints_train_the_same_weights(precision: Precision, reentrant: bool, accumulate: int) -> None:
    """Also where the weights are copies in low precision, and where statistics are collected."""
    data = batches(2 * accumulate)
    states = []
    for form in (None, "each"):
        torch.manual_seed(0)
        encoder = OwnCheckpoints(form, reentrant=reentrant)
        model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=32)
        step = train_step(model, precision=precision, grad_accum_steps=accumulate)
        assert (step.lowp_weights is not None) == (precision is BF16 and accumulate == 1)
        for k in range(2):
            assert step(data[k * accumulate : (k + 1) * accumulate], k).skipped == 0
        states.append(model.state_dict())
    for name, a in states[0].items():
        assert torch.equal(a, states[1][name]), name


def test_recomputation_of_a_pass_too_long_ago_is_refused() -> None:
    """A graph that is kept while the number of views changes again and again."""
    a = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = double_byol("each", reentrant=True)
    loss = model.forward_train(*a).loss
    with torch.no_grad():
        for k in range(MAX_CHANGES):
            with num_splits(model.encoder, 1 + k % 2):
                model.encoder(a.flatten(0, 1))
    with pytest.raises(RuntimeError, match=r"must be among the last 64.*call backward\(\) sooner"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0"])
def test_checkpoints_of_timm_change_nothing(name: str) -> None:
    timm = pytest.importorskip("timm", reason="pip install '.[peers]'")
    a = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        encoder = timm.create_model(name, num_classes=0, **({"img_size": 32} if "vit" in name else {}))
        encoder.set_grad_checkpointing(checkpoints)
        model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=32).double()
        assert model.view_batching == "batched"
        one_pass(model, a, a)
        models.append(model)
    same_gradients_and_buffers(*models)
