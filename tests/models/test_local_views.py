"""Local views, and views of two sizes, against a loop over views and pairs through plain networks of torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.models import BYOL, SimSiam, revert_split_batchnorm
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.builder import build_model
from byol_fast.models.networks import OnlineNetwork, TargetNetwork
from tests.models.helpers import CLOSE, Residual, equal

B = 6


def small_byol(**options: Any) -> BYOL:
    """In float64, with parameters and statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(Residual()))
    model = BYOL(encoder.double(), hidden_dim=16, projection_dim=5, image_size=12, **options)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs() * 0.1)
    return model


def random_views(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, size, size, dtype=torch.float64, generator=generator) for size in sizes]


def results(loss: Tensor, features: Tensor, online: OnlineNetwork, target: TargetNetwork) -> dict[str, Tensor]:
    """Loss, features, gradients and the buffers of both networks."""
    found = {"loss": loss.detach(), "features": features.detach()}
    found |= {f"d {name}": p.grad for name, p in online.named_parameters() if p.grad is not None}
    for which, network in (("online", online), ("target", target)):
        found |= {f"{which}.{name}": b.clone() for name, b in network.named_buffers()}
    return found


def pair_loss(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance of normalized rows, mean over the batch."""
    return (F.normalize(p, dim=1) - F.normalize(z.detach(), dim=1)).square().sum(1).mean()


def by_hand(model: BYOL, views: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Each view through plain networks on its own; also predictions and projections."""
    online, target = copy.deepcopy(model.online), copy.deepcopy(model.target)
    for network in (online, target):
        revert_split_batchnorm(network)
        assert {type(m) for m in network.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm1d, nn.BatchNorm2d}
    projections = [target.projector(target.encoder(view).flatten(1)) for view in views[:2]]
    features = [online.encoder(view).flatten(1) for view in views]
    predictions = [online.predictor(online.projector(f)) for f in features]
    assert all(output.norm(dim=1).min() > 0.1 for output in [*predictions, *projections])
    pairs = [(i, j) for i in range(len(views)) for j in range(2) if i != j]
    loss = 2 * sum(pair_loss(predictions[i], projections[j]) for i, j in pairs) / len(pairs)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    return results(loss, torch.cat(features[:2]), online, target), predictions, projections


SIZES = {
    "no local view": (12, 12),
    "global views of two sizes": (12, 8),
    "one": (12, 12, 8),
    "two": (12, 12, 8, 8),
    "sixteen": (12, 12, *[8] * 16),
    "of one size with both": (12, 12, 12, 12, 12),
    "of one size with view 2": (12, 8, 8, 8),
    "of two sizes": (12, 10, 8, 8, 9),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("way", ["batched", "separate", "checkpointed"])
def test_batch_equals_a_loop_over_views_and_pairs(sizes: tuple[int, ...], way: str) -> None:
    model, views = small_byol(view_batching="separate" if way == "separate" else "batched"), random_views(*sizes)
    assert model.not_batched_reason is None
    expected, predictions, projections = by_hand(model, views)
    assert model.loss(predictions, projections).item() == pytest.approx(expected["loss"].item(), rel=1e-12)
    if way == "checkpointed":
        assert checkpoint_blocks(model.encoder) == 1
    output = model.forward_train(*views)
    output.loss.backward()  # type: ignore[no-untyped-call]
    equal(results(output.loss, output.features, model.online, model.target), expected)
    spread = F.normalize(torch.stack(projections), dim=-1).std(1, correction=0).mean() * 5**0.5
    torch.testing.assert_close(output.embedding_std, spread.detach(), **CLOSE)


def test_views_of_one_size_pass_together_without_a_copy() -> None:
    model = small_byol()
    seen: dict[str, list[tuple[int, tuple[int, ...]]]] = {"online": [], "target": []}
    for name, network in (("online", model.online), ("target", model.target)):
        network.encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append((inputs[0].data_ptr(), tuple(inputs[0].shape)))
        )
    large, small = (
        torch.randn(v, B, s, s, 3, dtype=torch.float64).permute(0, 1, 4, 2, 3) for v, s in ((2, 12), (3, 8))
    )
    model.forward_train(*large)
    pair = large.data_ptr(), (2 * B, 3, 12, 12)
    assert seen == {"online": [pair], "target": [pair]}
    model.forward_train(*large, *small)
    assert seen["online"][1:] == [pair, (small.data_ptr(), (3 * B, 3, 8, 8))]
    assert seen["target"][1:] == [pair]
    model.forward_train(*small)  # the third is a local view: the target passes a part of the same batch
    assert seen["online"][3:] == [(small.data_ptr(), (3 * B, 3, 8, 8))]
    assert seen["target"][2:] == [(small.data_ptr(), (2 * B, 3, 8, 8))]


def test_bytes_of_local_views_are_normalized() -> None:
    model = small_byol().float()
    views = [(40 * view + 128).clamp(0, 255).to(torch.uint8) for view in random_views(12, 12, 8, 8)]
    expected = model.forward_train(*[model.normalize(view) for view in views]).loss
    assert model.forward_train(*views).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_simsiam_takes_views_of_two_sizes() -> None:
    torch.manual_seed(0)
    model = SimSiam(Residual().double(), hidden_dim=8, projection_dim=5, predictor_hidden_dim=3, image_size=12)
    views = random_views(12, 8)
    (z1, z2), (p1, p2), _ = model.online(*views)
    expected = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
    assert model.forward_train(*views).loss.item() == pytest.approx(expected.item(), rel=1e-12)


REFUSED = {
    "one view": ((12,), "BYOL: views must be 2 or more, got 1"),
    "view 2 of fewer images": ((12, (2, 3, 12, 12)), r"view2 must be \[6, 3, H, W\] as view1 .*, got \[2, 3, 12, 12\]"),
    "local view of fewer images": ((12, 12, 8, (2, 3, 8, 8)), r"local view 2 must be \[6, 3, H, W\] as view1"),
    "local view of other channels": ((12, 12, (B, 1, 8, 8)), r"local view 1 must be \[6, 3, H, W\] as view1"),
    "no images": ((12, 12, (B, 3)), r"local view 1 must be images \[B, 3, H, W\]"),
}


@pytest.mark.parametrize(("shapes", "message"), REFUSED.values(), ids=REFUSED)
def test_views_that_do_not_go_together_are_refused(shapes: tuple[Any, ...], message: str) -> None:
    shapes = tuple((B, 3, shape, shape) if isinstance(shape, int) else shape for shape in shapes)
    with pytest.raises(ValueError, match=message):
        small_byol().forward_train(*[torch.zeros(shape, dtype=torch.float64) for shape in shapes])


def test_local_view_of_another_dtype_is_refused() -> None:
    view1, view2, local = random_views(12, 12, 8)
    with pytest.raises(ValueError, match=r"local view 1 must be .* \(and torch.float64\), got .* of torch.float32"):
        small_byol().forward_train(view1, view2, local.float())


@pytest.mark.parametrize("sizes", [(12, 8), (12, 12, 8), (12, 12, 12)])
def test_common_statistics_are_of_two_views_of_one_size(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="views must be 2 of one size with view_batching concat"):
        small_byol(view_batching="concat").forward_train(*random_views(*sizes))


def test_simsiam_takes_two_views() -> None:
    model = SimSiam(Residual().double(), hidden_dim=8, projection_dim=5, predictor_hidden_dim=3, image_size=12)
    views = random_views(12, 12, 8)
    with pytest.raises(ValueError, match="SimSiam: views must be 2, got 3"):
        model.forward_train(*views)
    p = torch.ones(B, 5)
    with pytest.raises(ValueError, match="SimSiam: views must be 2, got 3"):
        model.loss((p, p, p), (p, p))


def test_encoder_made_for_one_size_is_refused() -> None:
    views = {"view1.size": 32, "view2.size": 32, "local_view.size": 16, "model.encoder": "vit_b_16"}
    config = configs.replace(Config(num_local_views=2), views)
    with torch.device("meta"), pytest.raises(ValueError, match=r"accept \[B, 3, 16, 16\].*height.*local_view\.size"):
        build_model(config)


@pytest.mark.parametrize("method", [BYOL, SimSiam])
def test_encoder_whose_features_depend_on_the_size_is_refused(method: Any) -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    method(encoder, hidden_dim=4, projection_dim=4, image_size=12)
    with pytest.raises(ValueError, match=r"features for images of 8 pixels as for 12, got 144 and 400.*view2\.size"):
        method(encoder, hidden_dim=4, projection_dim=4, image_size=12, other_image_sizes=(12, 8))
    with pytest.raises(ValueError, match="other_image_sizes"):
        method(encoder, hidden_dim=4, projection_dim=4, image_size=12, other_image_sizes=(0,))
