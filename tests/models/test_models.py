from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import nn

from byol_fast.config.fields import ViewBatching
from byol_fast.models.base import byol_loss_and_std
from byol_fast.models.byol import BYOL
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.models.layers import Normalize


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("resnet18", 32, 512),
        ("resnet50", 32, 2048),
        ("resnext50_32x4d", 32, 2048),
        ("convnext_tiny", 32, 768),
        ("vgg11_bn", 32, 512),
        ("mobilenet_v3_small", 32, 1024),
        ("vit_b_32", 64, 768),
        ("vgg16", 64, 512),
        ("inception_v3", 96, 2048),
        ("densenet121", 32, 1024),
        ("squeezenet1_1", 32, 512),
        ("resnet18_narrow", 28, 256),
        ("resnet18_lightly", 32, 512),
    ],
)
def test_encoders_by_name_return_their_features(name: str, size: int, features: int) -> None:
    encoder = build_encoder(name, image_size=size)
    assert feature_dim(encoder, size) == features


def test_named_resnet_is_torchvisions_without_its_classifier() -> None:
    torch.manual_seed(3)
    encoder = build_encoder("resnet18").eval()
    torch.manual_seed(3)
    plain = torchvision.models.resnet18().eval()
    plain.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(x), plain(x))


def test_lightlys_resnet_is_torchvisions_with_another_stem() -> None:
    """The rest of it is equal; the convolutions begin with PyTorch's own initialization."""
    encoder, plain = build_encoder("resnet18_lightly"), torchvision.models.resnet18()
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity(), nn.Identity())
    plain.conv1, plain.relu, plain.maxpool, plain.fc = stem
    plain.load_state_dict(encoder.state_dict())
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(encoder(x), plain(x))
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5  # of torch.nn's uniform distribution
            assert 0.95 * bound < float(module.weight.detach().abs().max()) <= bound
    torch.manual_seed(0)
    named = build_encoder("resnet18_lightly", cifar_stem=True)
    torch.manual_seed(0)
    same = build_encoder("resnet18_lightly")
    assert all(torch.equal(a, b) for a, b in zip(named.state_dict().values(), same.state_dict().values(), strict=True))
    identity = build_encoder("resnet18_lightly", zero_init_residual=True).state_dict()
    assert not any(bool(tensor.any()) for name, tensor in identity.items() if name.endswith("bn2.weight"))


def test_cifar_stem_keeps_the_resolution_until_the_second_stage() -> None:
    encoder = build_encoder("resnet18", cifar_stem=True)
    seen: list[tuple[int, ...]] = []
    layer: nn.Module = encoder.layer1  # type: ignore[assignment]
    layer.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    encoder(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]
    conv = encoder.conv1
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)


def test_zero_init_residual_makes_blocks_identities() -> None:
    encoder = build_encoder("resnet18", zero_init_residual=True).eval()
    block: nn.Module = encoder.layer1[1]  # type: ignore[index, assignment]
    x = torch.randn(2, 64, 8, 8).relu()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "resnet81"}, "did you mean resnet18"),
        ({"encoder": "vgg11", "cifar_stem": True}, "cifar_stem is for torchvision's ResNets, got 'vgg11'; drop it"),
        ({"encoder": nn.Linear(2, 2), "cifar_stem": True}, "go with an encoder's name"),
        ({"encoder": "resnet18_narrow", "pretrained": True}, "no pretrained weights"),
        ({"encoder": "resnet18_lightly", "pretrained": True}, "no pretrained weights"),
    ],
)
def test_impossible_encoders_are_explained(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(**arguments)  # type: ignore[arg-type]


def test_encoder_that_refuses_the_view_size_is_explained() -> None:
    with pytest.raises(ValueError, match=r"must accept \[B, 3, 32, 32\] images"):
        BYOL("inception_v3", image_size=32)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "size", "features", "views"),
    [
        ("resnet18", 64, 512, "batched"),
        ("vit_tiny_patch16_224", 32, 192, "batched"),
        ("convnext_atto", 64, 320, "batched"),
    ],
)
def test_timm_models_by_name(name: str, size: int, features: int, views: str) -> None:
    pytest.importorskip("timm", reason="pip install '.[peers]'")
    model = BYOL(f"timm/{name}", hidden_dim=16, projection_dim=8, image_size=size)
    assert (model.feature_dim, model.view_batching) == (features, views)
    p1, _, z1, _ = model(torch.randn(4, 3, size, size), torch.randn(4, 3, size, size))
    assert p1.shape == z1.shape == (4, 8)
    with pytest.raises(ValueError, match="did you mean timm/resnet18"):
        build_encoder("timm/resnet81")


class FunctionalNorm(nn.Module):
    """Batch normalization that is no module, and so cannot be told about views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(self.conv(x), None, None, training=True).mean((2, 3))


def test_an_encoder_that_mixes_images_by_itself_gets_its_views_one_by_one() -> None:
    torch.manual_seed(0)
    model = BYOL(FunctionalNorm(), hidden_dim=16, projection_dim=8, image_size=16)
    assert model.view_batching == "separate"
    assert model.not_batched_reason is not None
    assert "something in it mixes images" in model.not_batched_reason
    a, b, c = (torch.randn(6, 3, 16, 16) for _ in range(3))
    assert torch.equal(copy.deepcopy(model)(a, b)[0], copy.deepcopy(model)(a, c)[0])


@pytest.mark.parametrize("views", ["batched", "concat"])
def test_views_passed_at_once_are_the_separate_ones_or_another_algorithm(views: ViewBatching) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_dim": 16, "projection_dim": 8, "image_size": 32}
    separate = BYOL(
        "resnet18_narrow", hidden_dim=16, projection_dim=8, image_size=32, view_batching="separate"
    ).double()
    together = BYOL("resnet18_narrow", view_batching=views, **sizes).double()
    together.load_state_dict(separate.state_dict())
    a, b = (torch.randn(6, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    apart = max((x - y).abs().max().item() for x, y in zip(separate(a, b), together(a, b), strict=True))
    assert apart < 1e-12 if views == "batched" else apart > 1e-3


def test_feature_probe_leaves_the_encoder_as_it_was() -> None:
    encoder = build_encoder("resnet18").train()
    before = copy.deepcopy(encoder.state_dict())
    feature_dim(encoder, 32)
    assert encoder.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values(), strict=True))


def test_normalize_is_torchvisions() -> None:
    x = torch.randint(0, 256, (4, 3, 7, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = torchvision.transforms.functional.normalize(x.double() / 255, list(mean), list(std))
    got = Normalize(mean, std)(x)
    # Values reach 2.7; the two fp32 roundings of a multiply-add are within 2^-23 of that each.
    assert (got.double() - expected).abs().max() < 2.7 * 2**-22
    ready = torch.randn(2, 3, 4, 4)
    assert Normalize(mean, std)(ready) is ready


def test_normalize_keeps_channels_last() -> None:
    x = torch.randint(0, 256, (4, 7, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert Normalize((0.5,) * 3, (0.5,) * 3)(x).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------ BYOL


@pytest.fixture
def model() -> BYOL:
    torch.manual_seed(0)
    return BYOL("resnet18_narrow", hidden_dim=32, projection_dim=16, image_size=16)


def test_target_starts_as_a_copy_and_gets_no_gradient(model: BYOL) -> None:
    target, online = model.target_parameters(), model.trainable_parameters()
    assert all(torch.equal(t, o) and t is not o for t, o in zip(target, online, strict=False))
    p1, p2, z1, z2 = model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    assert not z1.requires_grad
    model.loss((p1, p2), (z1, z2)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in online)
    assert all(p.grad is None for p in target)


def test_views_pass_the_networks_one_at_a_time(model: BYOL) -> None:
    """Batch norm must see one view at a time: a view's outputs may not depend on the other view."""
    a, b, c = (torch.randn(6, 3, 16, 16) for _ in range(3))
    with_b, with_c = copy.deepcopy(model)(a, b), copy.deepcopy(model)(a, c)
    assert torch.equal(with_b[0], with_c[0])
    assert torch.equal(with_b[2], with_c[2])


def test_target_keeps_its_own_running_statistics(model: BYOL) -> None:
    with torch.no_grad():
        for p in model.target.parameters():
            p.mul_(0.5)
    model(torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16))
    online, target = dict(model.online.encoder.named_buffers()), dict(model.target.encoder.named_buffers())
    assert int(target["bn1.num_batches_tracked"]) == int(online["bn1.num_batches_tracked"]) == 2
    assert not torch.equal(target["layer1.0.bn1.running_var"], online["layer1.0.bn1.running_var"])
    before = {k: v.clone() for k, v in target.items()}
    model.update_target(0.5)
    assert all(torch.equal(before[k], v) for k, v in model.target.encoder.named_buffers())


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0, torch.tensor(0.25)])
def test_update_target_moves_parameters_by_tau(model: BYOL, tau: float | torch.Tensor) -> None:
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in model.target_parameters()]
    model.update_target(tau)
    for old, new, online in zip(before, model.target_parameters(), model.trainable_parameters(), strict=False):
        expected = float(tau) * old.double() + (1 - float(tau)) * online.detach().double()
        torch.testing.assert_close(new.double(), expected, rtol=3e-7, atol=1e-7)


def test_heads_are_the_references(model: BYOL) -> None:
    linear, norm, relu, last = cast("nn.Sequential", model.online.predictor)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(relu, nn.ReLU)
    assert isinstance(linear, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert linear.bias is not None
    assert last.bias is None
    sizes: dict[str, Any] = {"hidden_dim": 8, "projection_dim": 4, "image_size": 16, "projector_layers": 3}
    lightlys = BYOL("resnet18_narrow", hidden_bias=False, last_bias=True, **sizes).online
    for head in (lightlys.projector, lightlys.predictor):
        assert [m.bias is not None for m in head.modules() if isinstance(m, nn.Linear)] == [
            *[False] * (len(head) // 3),
            True,
        ]


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), r"must be images \[B, 3, H, W\]"),
        (torch.zeros(4, 1, 16, 16, dtype=torch.uint8), r"must be images \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 16, 16), "B of 2 or more"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.int64), "must be uint8, or normalized floating point"),
        (torch.zeros(5, 3, 16, 16), r"view2 must be \[5, 3, H, W\] as view1"),
    ],
)
def test_impossible_views_are_explained(model: BYOL, view: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(view, torch.zeros(4, 3, 16, 16))


def test_any_module_can_be_the_encoder() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.adaptive_avg_pool2d(self.conv(x), 1)

    encoder = Features()
    model = BYOL(encoder, hidden_dim=8, projection_dim=4, image_size=12)
    assert model.encoder is encoder
    assert model.feature_dim == 5
    p1, *_ = model(torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12))
    assert p1.shape == (2, 4)


def test_collapse_meter_reads_one_when_spread_and_zero_when_collapsed() -> None:
    torch.manual_seed(0)
    spread = torch.randn(4096, 64)
    _, std = byol_loss_and_std(spread, spread, spread, spread.flip(0))
    assert abs(float(std) - 1) < 0.02  # sampling error of a std from 4096 values, 64 of them averaged: 0.002
    point = torch.ones(16, 64) * torch.rand(16, 1)
    assert float(byol_loss_and_std(point, point, point, point)[1]) < 1e-6
