"""The guide's interface: its script runs, and results equal those of the guide's own code."""

from __future__ import annotations

import copy
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import guide_original as original
from byol_fast.compat import guide, guide_model
from byol_fast.models.encoders import build_encoder
from tests.compat import guide_script
from tests.compat.helpers import SMALL_VIEW, max_difference, normalize, small_guide, small_network
from tests.conftest import real_data


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve training images of CIFAR-10."""
    archive = real_data("cifar10_jpeg.tar.xz")
    root = tmp_path_factory.mktemp("cifar")
    count = 0
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith((".jpg", ".jpeg")):
                tar.extract(member, root, filter="data")
                count += 1
            if count == 12:
                return root
    raise AssertionError(archive)


def test_guide_script_runs(cifar: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("BYOL_FAST_DATA", str(cifar))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, guide.logger.name):
        model = guide_script.main(batch_size=6, num_workers=2, num_epochs=1)
    assert any("step 0: loss" in message for message in caplog.messages)
    assert "loss after training" in caplog.messages[-1]
    moved = [
        float((online.detach() - target).abs().max())
        for online, target in zip(model.online_encoder.parameters(), model.target_encoder.parameters(), strict=True)
    ]
    # Two steps of Adam change a weight by at most 0.001 each, and the EMA the target by 0.4 % of that.
    assert 0 < max(moved) <= 2.1e-3
    # The script's own network was trained.
    assert model.model.conv1.weight is model.online_encoder.feature_extractor[0].weight  # type: ignore[union-attr, index]


def test_entrypoint_trains_ten_epochs(
    photos: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        Image.fromarray(photos[i]).save(images / f"{i}.png")
    monkeypatch.setenv("BYOL_FAST_DATA", str(images))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from torchvision.models import ResNet18_Weights, resnet18

    stored = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    stored.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), stored)
    monkeypatch.setattr(guide_model, "recipes", SmallGuide)  # 224 px take minutes
    with caplog.at_level(logging.INFO, guide.logger.name):
        model = guide.entrypoint()
    assert caplog.messages[0].startswith("epoch 1 of 10, step 0: loss")
    began = torch.load(stored)["conv1.weight"]
    trained = model.get_parameter("model.conv1.weight").detach()
    assert trained.data_ptr() == next(model.online_encoder.parameters()).data_ptr()
    assert 1e-4 < float((trained - began).abs().max()) < 1.5e-2  # ten steps of about 0.001


class SmallGuide:
    """The guide's recipe with views of 32 px."""

    @staticmethod
    def seed_guide() -> Any:
        from byol_fast import config
        from byol_fast.config import recipes

        return config.replace(recipes.seed_guide(), {"view1": {"size": 32}, "view2": {"size": 32}})


class GivenViews(guide.BYOL):
    """Returns the first and the last three channels of an image as its views."""

    def transform(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image[:3], image[3:]


def both_models() -> tuple[GivenViews, original.BYOL]:
    """Our model and the guide's, in float64, with equal weights."""
    torch.manual_seed(0)
    net = build_encoder("resnet18_narrow").double()
    reference = original.BYOL(net, net, 256).double()
    reference.transform = lambda image: (image[:3], image[3:])  # type: ignore[method-assign]
    net = copy.deepcopy(net)
    model = GivenViews(net, net, 256)
    for mine, other in (
        (model.online_encoder.projector, reference.online_encoder[2]),
        (model.target_encoder.projector, reference.target_encoder[2]),
        (model.predictor, reference.predictor),
    ):
        mine.load_state_dict(other.state_dict())  # type: ignore[union-attr]
    return model, reference


def views(batches: int) -> list[tuple[Tensor, None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 6, 32, 32, dtype=torch.float64, generator=generator), None) for _ in range(batches)]


def test_outputs_and_gradients_equal_the_guide() -> None:
    model, reference = both_models()
    (images, _), *_ = views(1)
    x1, x2 = images[:, :3], images[:, 3:]
    mine, other = model(x1, x2), reference(x1, x2)
    # float64: some thousand roundings of 1e-16.
    assert max_difference(iter(mine), iter(other)) < 1e-12
    assert all(not t.requires_grad for t in mine[2:])
    a, b = model.loss(mine[:2], mine[2:]), reference.loss(other[:2], other[2:])
    assert a.item() == pytest.approx(b.item(), abs=1e-12)
    a.backward()  # type: ignore[no-untyped-call]
    b.backward()  # type: ignore[no-untyped-call]
    mine_p = [*model.online_encoder.parameters(), *model.predictor.parameters()]
    other_p = [*reference.online_encoder.parameters(), *reference.predictor.parameters()]
    gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in (mine_p, other_p)]
    assert len(gradients[0]) == len(mine_p)
    assert max_difference(iter(gradients[0]), iter(gradients[1])) < 1e-10
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert max_difference(model.online_encoder.buffers(), reference.online_encoder.buffers()) < 1e-12
    assert max_difference(model.target_encoder.buffers(), reference.target_encoder.buffers()) < 1e-12


def test_training_equals_the_guide() -> None:
    """A gradient's rounding, 1e-15, can become lr * 1e-15 / 1e-8 = 1e-10 in a step of Adam."""
    model, reference = both_models()
    losses: list[float] = []
    reference.register_forward_hook(lambda _, __, out: losses.append(reference.loss(out[:2], out[2:]).item()))
    loader = views(2)
    original.train_byol(reference, loader, num_epochs=2)  # type: ignore[arg-type]
    losses_of_model = guide.train_byol(model, loader, num_epochs=2)
    assert len(losses) == 4
    assert losses_of_model == pytest.approx(losses, rel=1e-9)
    for name in ("online_encoder", "target_encoder", "predictor"):
        mine, other = getattr(model, name), getattr(reference, name)
        assert max_difference(mine.parameters(), other.parameters()) < 1e-9, name
        assert max_difference(mine.buffers(), other.buffers()) < 1e-9, name


def test_target_update_changes_parameters_only() -> None:
    model = small_guide()
    with torch.no_grad():
        for p in model.online_encoder.parameters():
            p.add_(torch.randn_like(p))
        for b in model.online_encoder.buffers():
            b.add_(1)
    before = [p.detach().clone() for p in model.target_encoder.parameters()]
    buffers = [b.clone() for b in model.target_encoder.buffers()]
    model.update_target_network()
    online = list(model.online_encoder.parameters())
    for was, now, o in zip(before, model.target_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.996 * was + (1 - 0.996) * o.detach(), rtol=3e-7, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.target_encoder.buffers(), strict=True))


def test_network_whose_copy_uses_its_weights_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    network.forward = torch.autocast("cpu", enabled=False)(network.forward)  # type: ignore[method-assign]
    model = guide.BYOL(network, network, 4)
    with pytest.raises(ValueError, match="a copy of Encoder must use weights of its own"):
        model(*torch.randn(2, 4, 3, 8, 8))


def test_network_that_mixes_images_gets_separate_views() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x - x.mean(0))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Mixing()
    model = guide.BYOL(net, net, 8, view=SMALL_VIEW)
    apart = copy.deepcopy(model)
    x1, x2 = torch.randn(2, 4, 3, 16, 16)
    p1, p2, *_ = model(x1, x2)
    assert model.not_batched_reason is not None
    torch.testing.assert_close(p1, apart.predictor(apart.online_encoder(x1)))
    torch.testing.assert_close(p2, apart.predictor(apart.online_encoder(x2)))


def test_train_byol_accepts_iterables_and_logs_every_hundred_steps(
    photos: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_guide()
    batches = [(normalize(photos[:4]), torch.zeros(4)), (torch.from_numpy(photos[4:8]).permute(0, 3, 1, 2), None)]
    with caplog.at_level(logging.INFO, guide.logger.name):
        losses = guide.train_byol(model, (batches[i % 2] for i in range(201)), num_epochs=1)
    assert [message.split(":")[0] for message in caplog.messages] == [f"epoch 1 of 1, step {k}" for k in (0, 100, 200)]
    assert f"loss {losses[200]:.4f}" in caplog.messages[2]
    assert len(losses) == 201
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    model.eval()
    guide.train_byol(model, [[list(batches[0][0]), None]], num_epochs=2)  # type: ignore[list-item]
    assert model.training


def test_train_byol_raises_errors(photos: np.ndarray) -> None:
    images = normalize(photos[:4])
    generator = ((images, None) for _ in range(2))
    with pytest.raises(ValueError, match="got none in epoch 2; a generator is exhausted after one epoch"):
        guide.train_byol(small_guide(), generator, num_epochs=2)
    with pytest.raises(ValueError, match=r"must yield \(images, labels\), got Tensor \[4, 3, 32, 32\]"):
        guide.train_byol(small_guide(), [images])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="images must be one or more, got none"):
        guide.train_byol(small_guide(), [([], None)])
    with pytest.raises(ValueError, match="loss must be finite, got nan in step"):
        guide.train_byol(small_guide(), [(images, None)], lr=1e30)

    class Failing(guide.BYOL):
        def transform(self, image: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("a worker's own error")

    net = small_network()
    with pytest.raises(RuntimeError, match="a worker's own error"):
        guide.train_byol(Failing(net, net, 8), [(images, None)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9,), "feature_size must be the number of flattened features, 8, got 9"),
        ((0,), "feature_size must be 1 or more"),
        ((8, 1.5), "tau must be from 0 to 1, got 1.5"),
    ],
)
def test_invalid_byol_arguments_raise(arguments: Any, message: str) -> None:
    net = small_network()
    with pytest.raises(ValueError, match=message):
        guide.BYOL(net, net, *arguments)(*torch.randn(2, 4, 3, 16, 16))


def test_equivalent_feature_extractors_give_equal_features() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    base = resnet18()
    kinds: list[Any] = [
        nn.Sequential(*list(base.children())[:-1]),
        "avgpool",
        lambda network: nn.Sequential(*list(network.children())[:-1]),
    ]
    x = torch.randn(2, 3, 32, 32)
    features = []
    for kind in kinds:
        model = guide.BYOL(base, kind, 512).eval()
        assert any(p is base.conv1.weight for p in model.online_encoder.parameters())
        features.append(model.online_encoder.feature_extractor(x).flatten(1))  # type: ignore[operator]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    with pytest.raises(ValueError, match="must name a layer of ResNet, got 'pool'; it has .*avgpool, "):
        guide.BYOL(base, "pool", 512)
    with pytest.raises(ValueError, match="returns a module, got int"):
        guide.BYOL(base, lambda _: 3, 512)  # type: ignore[arg-type, return-value]


def test_state_is_saved_and_mode_and_dtype_can_change(tmp_path: Path) -> None:
    model = small_guide()
    x1, x2 = torch.randn(2, 4, 3, 16, 16)
    untouched = model.state_dict().keys()
    model(x1, x2)
    assert model.state_dict().keys() == untouched
    torch.save(model.state_dict(), tmp_path / "model.pt")
    net = small_network()
    other = guide.BYOL(net, net, 8)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    a, b = model.eval()(x1, x2), other.eval()(x1, x2)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    wide = copy.deepcopy(other).double()(x1.double(), x2.double())
    assert max_difference(iter(b), iter(wide)) < 1e-5
    assert not any(m.training for m in (other.online_encoder, other.target_encoder, other.predictor))


def test_base_class_of_tasks() -> None:
    task = guide.SelfSupervisedTask(nn.Linear(2, 3))
    x = torch.randn(4, 2)
    assert torch.equal(task(x), task.model(x))
    with pytest.raises(NotImplementedError, match="SelfSupervisedTask: loss must be defined"):
        task.loss(x)
    with pytest.raises(NotImplementedError, match="transform must be defined"):
        task.transform(x)


def test_device_is_determined_at_access(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert guide.device == torch.device(kind)
