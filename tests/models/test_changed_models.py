"""Models that other programs change, copy or trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torchvision.models.resnet import BasicBlock, ResNet

from byol_fast.models import (
    BYOL,
    SimSiam,
    convert_split_batchnorm,
    convert_sync_batchnorm,
    revert_split_batchnorm,
)
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.gpu_tuning import tune_for_gpu
from byol_fast.models.split_batchnorm_layers import num_splits
from byol_fast.utils.cpu_tuning import use_small_map_convolutions
from tests.models.helpers import OwnForward, with_norm

SIZES: dict[str, Any] = {"hidden_dim": 16, "projection_dim": 8, "image_size": 32}


class SubclassedNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class DefinedHere(nn.Sequential):
    """Batch norms of every kind that is converted."""

    def __init__(self) -> None:
        layers = (nn.BatchNorm2d(4), SubclassedNorm(4), OwnForward(4), nn.BatchNorm2d(4, affine=False))
        super().__init__(nn.Conv2d(3, 4, 3), *layers, nn.AdaptiveAvgPool2d(1))


def residual_encoder() -> nn.Module:
    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.fc = nn.Identity()
    encoder: nn.Module = network
    return encoder


def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 6, 3, 32, 32, generator=generator)
    return first, second


def loss_of(model: BYOL | SimSiam) -> float:
    return float(model.forward_train(*views()).loss.detach())


# ------------------------------------------------------------------ layers that were put in afterwards


def replace_block(model: BYOL) -> None:
    model.encoder.get_submodule("layer2").register_module(
        "0", nn.Sequential(nn.Conv2d(64, 128, 3, stride=2), nn.BatchNorm2d(128))
    )


def replace_encoder(model: BYOL) -> None:
    model.online.encoder = residual_encoder()


def replace_target_block(model: BYOL) -> None:
    block = model.target.get_submodule("encoder.layer4.0")
    block.bn2 = nn.Sequential(nn.InstanceNorm2d(512, track_running_stats=True))


@pytest.mark.parametrize(
    ("change", "layer", "compiled"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm at encoder.bn1", False),
        (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm at encoder.bn1", True),
        (replace_block, "BatchNorm2d at encoder.layer2.0.1", False),
        (replace_encoder, "BatchNorm2d at encoder.bn1", False),
        (replace_target_block, "InstanceNorm2d at encoder.layer4.0.bn2.0", False),
    ],
)
def test_batch_norm_put_in_after_the_conversion_is_refused(change: Any, layer: str, compiled: bool) -> None:
    model = BYOL(residual_encoder(), **SIZES)
    change(model)
    torch._dynamo.reset()
    forward = torch.compile(model.forward_train, backend="eager") if compiled else model.forward_train
    with pytest.raises(ValueError, match=f"must be converted, got {layer}.*convert_sync_batchnorm"):
        forward(*views())


def test_converted_changes_take_the_views_apart_again() -> None:
    """As the message says: the loss is then that of the unchanged model."""
    model = BYOL(residual_encoder(), **SIZES)
    expected = loss_of(copy.deepcopy(model))
    changed: BYOL = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))  # type: ignore[no-untyped-call]
    assert convert_split_batchnorm(changed) is None
    assert loss_of(changed) == expected
    convert_sync_batchnorm(model)
    assert loss_of(model) == expected


def test_frozen_batch_norm_needs_no_conversion() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval())
    x = torch.randn(4, 3, 8, 8)
    with num_splits(network, 2):
        assert torch.equal(network(x), nn.Sequential(*network)(x))


def test_replaced_online_network_is_the_one_that_is_called() -> None:
    model, other = (BYOL(residual_encoder(), **SIZES) for _ in range(2))
    expected = loss_of(copy.deepcopy(other))
    model.online, model.target = other.online, other.target
    assert loss_of(model) == expected


# ------------------------------------------------------------------ copies


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("encoder", ["resnet18_narrow", "every norm"])
@pytest.mark.parametrize("method", [BYOL, SimSiam])
def test_copied_model_computes_the_same(method: Any, encoder: str, way: str) -> None:
    torch.manual_seed(0)
    model = method(DefinedHere() if encoder == "every norm" else encoder, **SIZES)
    assert model.view_batching == "batched"
    loss_of(model)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    assert [type(a) for a in loaded.modules()] == [type(a) for a in model.modules()]
    for output, expected in zip(loaded(*views()), model(*views()), strict=True):
        assert torch.equal(output, expected)
    for (name, buffer), other in zip(loaded.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, other), name


# ------------------------------------------------------------------ tracers


def trained_encoder() -> nn.Module:
    """An encoder in the form that it has in a training run."""
    model = BYOL(residual_encoder(), **SIZES).to(memory_format=torch.channels_last)
    loss_of(model)
    tune_for_gpu(model.encoder)
    use_small_map_convolutions(model.encoder)
    return model.encoder.eval()


def test_encoder_can_be_traced_and_exported() -> None:
    encoder, images = trained_encoder(), views()[0]
    expected = encoder(images)
    traced = torch.jit.trace(encoder, images[:2])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(images), expected)
    torch.testing.assert_close(torch.export.export(encoder, (images,)).module()(images), expected)


def test_symbolic_tracing_says_how_to_get_a_plain_network() -> None:
    network = with_norm(nn.BatchNorm2d(4))
    convert_split_batchnorm(network)
    for mode in (True, False):
        with pytest.raises(TypeError, match=r"revert_split_batchnorm\(copy.deepcopy\(network\)\)"):
            torch.fx.symbolic_trace(network.train(mode))


def test_reverted_encoder_is_torchs_and_can_be_traced() -> None:
    encoder, images = trained_encoder(), views()[0]
    reverted = copy.deepcopy(encoder)
    revert_split_batchnorm(reverted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in residual_encoder().modules()]
    assert "byol_fast" not in pickle.dumps(reverted).decode("latin-1")
    torch.testing.assert_close(torch.fx.symbolic_trace(reverted)(images), encoder(images))


def test_norm_whose_class_was_changed_is_not_reverted() -> None:
    """The parametrization, which is in that class, would be lost."""
    network = with_norm(nn.BatchNorm2d(4))
    convert_split_batchnorm(network)
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    with pytest.raises(ValueError, match="got ParametrizedSplitBatchNorm2d; first undo.*remove_parametrizations"):
        revert_split_batchnorm(network)
    parametrize.remove_parametrizations(norm, "weight")
    revert_split_batchnorm(network)
    assert type(norm) is nn.BatchNorm2d


def test_parameter_of_two_networks_is_trained_once() -> None:
    model = BYOL(residual_encoder(), **SIZES)
    tied = model.online.get_parameter("projector.3.weight")
    model.online.predictor.get_submodule("3").register_parameter("weight", tied)
    parameters = model.trainable_parameters()
    assert sum(p is tied for p in parameters) == 1
    assert set(parameters) == set(model.online.parameters())
    followed = parameters[: len(model.target_parameters())]
    assert [p.shape for p in followed] == [p.shape for p in model.target_parameters()]


@pytest.mark.parametrize("transform", ["torch.func", "dual numbers"])
def test_forward_mode_derivatives_of_views_pass_the_model(transform: str) -> None:
    """The views lie in memory one behind the other; their tangents do not."""
    model = BYOL(residual_encoder(), **SIZES).double().eval()
    a, b = torch.cat(views()).double().chunk(2)
    generator = torch.Generator().manual_seed(2)
    ta, tb = (torch.randn(a.shape, dtype=torch.float64, generator=generator) for _ in range(2))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return model.forward_train(a, b).loss

    if transform == "torch.func":
        derivative = torch.func.jvp(loss, (a, b), (ta, tb))[1]
    else:
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(a, ta), forward_ad.make_dual(b, tb))  # type: ignore[no-untyped-call]
            derivative = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    da, db = torch.autograd.grad(loss(a.requires_grad_(), b.requires_grad_()), (a, b))
    torch.testing.assert_close(derivative, (da * ta).sum() + (db * tb).sum(), rtol=1e-9, atol=1e-12)


def test_checkpointed_encoder_can_be_pickled() -> None:
    model = BYOL(residual_encoder(), **SIZES)
    checkpoint_blocks(model.encoder)
    loaded = pickle.loads(pickle.dumps(model))
    loaded.encoder.layer1[0].conv1.weight.data.zero_()
    assert loss_of(loaded) != loss_of(model)  # its blocks are its own
