"""The practical guide's names: its script runs, and what it computes is what the guide's own code computes."""

from __future__ import annotations

import copy
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from benchmarks import guide_original as original
from byol_fast.compat import guide
from byol_fast.config import ViewConfig
from byol_fast.models.encoders import build_encoder
from tests.compat import guide_script

SMALL = ViewConfig(size=16, scale=(0.2, 1.0), interpolation="bilinear", blur_p=0.5, blur_kernel=3)


@pytest.fixture
def folder(tmp_path: Path, photos: np.ndarray) -> Path:
    """Twelve images of 32 px in three classes."""
    for i, image in enumerate(photos[:12]):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve training images of CIFAR-10, from BYOL_FAST_TEST_DATA or the shared folder."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    archive = Path(os.environ.get("BYOL_FAST_TEST_DATA", beside)) / "cifar10_jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("no cifar10_jpeg.tar.xz; set BYOL_FAST_TEST_DATA to the folder that holds it")
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


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def tiny() -> guide.BYOL:
    torch.manual_seed(0)
    net = tiny_net()
    return guide.BYOL(net, net, 8, view=SMALL)


def normalised(photos: np.ndarray) -> Tensor:
    to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)])
    return torch.stack([to_float(image) for image in photos])


# ------------------------------------------------------------------------------------------------ the script


def test_the_guides_script_runs(cifar: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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
    # Two steps of Adam move a weight by 0.001 each at most, and the target follows by 0.4 % of that.
    assert 0 < max(moved) <= 2.1e-3
    # The script's own network is what was trained.
    assert model.model.conv1.weight is model.online_encoder.feature_extractor[0].weight  # type: ignore[union-attr, index]


def test_entrypoint_is_the_whole_run(
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
    monkeypatch.setattr(guide, "recipes", SmallGuide)  # 224 px take minutes
    with caplog.at_level(logging.INFO, guide.logger.name):
        model = guide.entrypoint()
    assert caplog.messages[0].startswith("epoch 1 of 10, step 0: loss")
    began = torch.load(stored)["conv1.weight"]
    trained = model.get_parameter("model.conv1.weight").detach()
    assert trained.data_ptr() == next(model.online_encoder.parameters()).data_ptr()
    assert 1e-4 < float((trained - began).abs().max()) < 1.5e-2  # ten steps of 0.001, a little more at first


class SmallGuide:
    """The guide's recipe with views of 32 px."""

    @staticmethod
    def seed_guide() -> Any:
        from byol_fast import config
        from byol_fast.config import recipes

        return config.replace(recipes.seed_guide(), {"view1": {"size": 32}, "view2": {"size": 32}})


# ------------------------------------------------------------------------------------------------ the same numbers


class Given(guide.BYOL):
    """Takes two views for an image: its first three channels and its last."""

    def transform(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image[:3], image[3:]


def both() -> tuple[Given, original.BYOL]:
    """Ours and the guide's, in float64, with equal weights."""
    torch.manual_seed(0)
    net = build_encoder("resnet18_narrow").double()
    theirs = original.BYOL(net, net, 256).double()
    theirs.transform = lambda image: (image[:3], image[3:])  # type: ignore[method-assign]
    net = copy.deepcopy(net)
    ours = Given(net, net, 256)
    for mine, other in (
        (ours.online_encoder.projector, theirs.online_encoder[2]),
        (ours.target_encoder.projector, theirs.target_encoder[2]),
        (ours.predictor, theirs.predictor),
    ):
        mine.load_state_dict(other.state_dict())  # type: ignore[union-attr]
    return ours, theirs


def views(batches: int) -> list[tuple[Tensor, None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 6, 32, 32, dtype=torch.float64, generator=generator), None) for _ in range(batches)]


def worst(a: Iterator[Tensor], b: Iterator[Tensor]) -> float:
    """Largest difference of tensors, in units of the largest value."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1.0)) for x, y in pairs)


def test_outputs_and_gradients_are_the_guides() -> None:
    ours, theirs = both()
    (images, _), *_ = views(1)
    x1, x2 = images[:, :3], images[:, 3:]
    mine, other = ours(x1, x2), theirs(x1, x2)
    # float64: 1e-16 a rounding, some thousand of them in a row.
    assert worst(iter(mine), iter(other)) < 1e-12
    assert all(not t.requires_grad for t in mine[2:])
    a, b = ours.loss(mine[:2], mine[2:]), theirs.loss(other[:2], other[2:])
    assert a.item() == pytest.approx(b.item(), abs=1e-12)
    a.backward()  # type: ignore[no-untyped-call]
    b.backward()  # type: ignore[no-untyped-call]
    mine_p = [*ours.online_encoder.parameters(), *ours.predictor.parameters()]
    other_p = [*theirs.online_encoder.parameters(), *theirs.predictor.parameters()]
    gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in (mine_p, other_p)]
    assert len(gradients[0]) == len(mine_p)
    assert worst(iter(gradients[0]), iter(gradients[1])) < 1e-10
    assert all(p.grad is None for p in ours.target_encoder.parameters())
    assert worst(ours.online_encoder.buffers(), theirs.online_encoder.buffers()) < 1e-12
    assert worst(ours.target_encoder.buffers(), theirs.target_encoder.buffers()) < 1e-12


def test_training_is_the_guides() -> None:
    """Same views, same losses, and the same networks in the end.

    A gradient's rounding, 1e-15, can become lr * 1e-15 / 1e-8 = 1e-10 in a step of Adam.
    """
    ours, theirs = both()
    losses: list[float] = []
    theirs.register_forward_hook(lambda _, __, out: losses.append(theirs.loss(out[:2], out[2:]).item()))
    loader = views(2)
    original.train_byol(theirs, loader, num_epochs=2)  # type: ignore[arg-type]
    found = guide.train_byol(ours, loader, num_epochs=2)
    assert len(losses) == 4
    assert found == pytest.approx(losses, rel=1e-9)
    for name in ("online_encoder", "target_encoder", "predictor"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert worst(mine.parameters(), other.parameters()) < 1e-9, name
        assert worst(mine.buffers(), other.buffers()) < 1e-9, name


def test_the_target_follows_in_parameters_only() -> None:
    model = tiny()
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


def test_a_network_that_mixes_images_passes_its_views_apart() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x - x.mean(0))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Mixing()
    model = guide.BYOL(net, net, 8, view=SMALL)
    apart = copy.deepcopy(model)
    x1, x2 = torch.randn(2, 4, 3, 16, 16)
    p1, p2, *_ = model(x1, x2)
    assert model.views_note is not None
    torch.testing.assert_close(p1, apart.predictor(apart.online_encoder(x1)))
    torch.testing.assert_close(p2, apart.predictor(apart.online_encoder(x2)))


# ------------------------------------------------------------------------------------------------ views


def test_the_normalisation_is_undone_to_the_byte() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    normalise = transforms.Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)
    x = normalise(levels / 255)[None]
    assert torch.equal(guide.to_bytes(x, guide.CIFAR10_MEAN, guide.CIFAR10_STD)[0], levels)
    # What the guide's own code makes of them.
    wrapped = np.asarray(transforms.ToPILImage()(x[0]))
    assert (wrapped != levels.permute(1, 2, 0).numpy()).mean() > 0.9


def test_views_of_all_kinds_of_image_are_the_same(photos: np.ndarray) -> None:
    model = tiny()
    image = photos[0]
    forms: list[Any] = [normalised(photos[:1])[0], torch.from_numpy(image).permute(2, 0, 1), Image.fromarray(image)]
    made = []
    for form in [*forms, image]:
        torch.manual_seed(5)
        made.append(model.transform(form))
    for first, second in made:
        assert first.shape == second.shape == (3, 16, 16)
        assert torch.equal(first, made[0][0])
        assert torch.equal(second, made[0][1])
    first, second = made[0]
    assert not torch.equal(first, second)
    # Normalised with mean and std 0.5: bytes from -1 to 1.
    levels = (first * 0.5 + 0.5) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert -1 <= float(first.min()) < float(first.max()) <= 1


def test_every_image_of_a_batch_has_its_own_draws(photos: np.ndarray) -> None:
    model = tiny()
    same = normalised(photos[:1]).expand(8, -1, -1, -1)
    torch.manual_seed(3)
    x1, x2 = guide.transform_image(same, model)
    flat = torch.cat([x1, x2]).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(16) * 1e3
    assert float(distances.min()) > 0.1
    torch.manual_seed(3)
    again = guide.transform_image(list(same), model)
    assert torch.equal(again[0], x1)
    assert torch.equal(again[1], x2)


def test_images_of_different_sizes_become_one_batch(photos: np.ndarray) -> None:
    pictures = [Image.fromarray(photos[i]).resize((20 + 7 * i, 30)) for i in range(3)]
    x1, x2 = guide.transform_image(pictures, tiny())
    assert x1.shape == x2.shape == (3, 3, 16, 16)
    assert len({float(x.sum()) for x in x1}) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 32, 32), r"must be \[3, H, W\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "uint8 or floating point"),
        (torch.full((3, 32, 32), 5.0), "must be normalised with mean"),
        (torch.full((3, 32, 32), float("nan")), "must be normalised with mean"),
        ("photo.jpg", "a PIL image, got str"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().transform(image)


# ------------------------------------------------------------------------------------------------ data


def test_loaded_images_are_crops_of_the_images(folder: Path, photos: np.ndarray) -> None:
    loader = guide.load_data(batch_size=5, num_workers=0, root=folder)
    assert len(loader) == 3
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    seen = []
    for images, labels in batches:
        for x, label in zip(guide.to_bytes(images, guide.CIFAR10_MEAN, guide.CIFAR10_STD), labels, strict=True):
            (found,) = [i for i in range(12) if is_crop(x.permute(1, 2, 0).numpy(), photos[i])]
            assert found % 3 == int(label)
            seen.append(found)
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)


def is_crop(x: np.ndarray, image: np.ndarray) -> bool:
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = (padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9))
    return any(np.array_equal(x, crop) or np.array_equal(x, crop[:, ::-1]) for crop in crops)


def test_workers_change_nothing(folder: Path) -> None:
    loaders = [guide.load_data(5, workers, root=folder) for workers in (0, 2)]
    epochs = []
    for loader in loaders:
        torch.manual_seed(0)
        epochs.append([*loader, *loader])
    for (a, la), (b, lb) in zip(*epochs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert not torch.equal(epochs[0][0][0], epochs[0][3][0])  # another epoch, another order


def test_load_data_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYOL_FAST_DATA", raising=False)
    with pytest.raises(ValueError, match=r"load_data: .*does not exist.*load_data\(root=FOLDER\), or BYOL_FAST_DATA"):
        guide.load_data(root=tmp_path / "nothing")
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        guide.load_data(0)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be fetched \(no route to host\).*BYOL_FAST_DATA=FOLDER"):
        guide.load_data()
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"32 x 32 pixels as CIFAR-10's, got 32 x 40 in .*wide.png"):
        guide.load_data(root=tmp_path)


# ------------------------------------------------------------------------------------------------ training


def test_train_byol_takes_any_iterable_and_logs_every_hundred_steps(
    photos: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    batches = [(normalised(photos[:4]), torch.zeros(4)), (torch.from_numpy(photos[4:8]).permute(0, 3, 1, 2), None)]
    with caplog.at_level(logging.INFO, guide.logger.name):
        losses = guide.train_byol(model, (batches[i % 2] for i in range(201)), num_epochs=1)
    assert [message.split(":")[0] for message in caplog.messages] == [f"epoch 1 of 1, step {k}" for k in (0, 100, 200)]
    assert f"loss {losses[200]:.4f}" in caplog.messages[2]
    assert len(losses) == 201
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    model.eval()
    guide.train_byol(model, [[list(batches[0][0]), None]], num_epochs=2)  # type: ignore[list-item]
    assert model.training


def test_errors_are_raised_and_not_swallowed(photos: np.ndarray) -> None:
    images = normalised(photos[:4])
    generator = ((images, None) for _ in range(2))
    with pytest.raises(ValueError, match="got none in epoch 2; a generator is used up after one pass"):
        guide.train_byol(tiny(), generator, num_epochs=2)
    with pytest.raises(ValueError, match=r"must give \(images, labels\), got Tensor \[4, 3, 32, 32\]"):
        guide.train_byol(tiny(), [images])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="images must be one or more, got none"):
        guide.train_byol(tiny(), [([], None)])
    with pytest.raises(ValueError, match="loss must be finite, got nan in step"):
        guide.train_byol(tiny(), [(images, None)], lr=1e30)

    class Failing(guide.BYOL):
        def transform(self, image: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("a worker's own error")

    net = tiny_net()
    with pytest.raises(RuntimeError, match="a worker's own error"):
        guide.train_byol(Failing(net, net, 8), [(images, None)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9,), "feature_size must be what feature_extractor gives for an image, 8 numbers once flattened, got 9"),
        ((0,), "feature_size must be 1 or more"),
        ((8, 1.5), "tau must be from 0 to 1, got 1.5"),
    ],
)
def test_byol_says_what_does_not_fit(arguments: Any, message: str) -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match=message):
        guide.BYOL(net, net, *arguments)(*torch.randn(2, 4, 3, 16, 16))


def test_feature_extractors_of_all_kinds_are_the_same() -> None:
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


def test_state_survives_saving_and_changes_of_mode_and_dtype(tmp_path: Path) -> None:
    model = tiny()
    x1, x2 = torch.randn(2, 4, 3, 16, 16)
    untouched = model.state_dict().keys()
    model(x1, x2)
    assert model.state_dict().keys() == untouched
    torch.save(model.state_dict(), tmp_path / "model.pt")
    net = tiny_net()
    other = guide.BYOL(net, net, 8)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    a, b = model.eval()(x1, x2), other.eval()(x1, x2)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    wide = copy.deepcopy(other).double()(x1.double(), x2.double())
    assert worst(iter(b), iter(wide)) < 1e-5
    assert not any(m.training for m in (other.online_encoder, other.target_encoder, other.predictor))


def test_a_task_of_ones_own() -> None:
    task = guide.SelfSupervisedTask(nn.Linear(2, 3))
    x = torch.randn(4, 2)
    assert torch.equal(task(x), task.model(x))
    with pytest.raises(NotImplementedError, match="SelfSupervisedTask: loss must be defined"):
        task.loss(x)
    with pytest.raises(NotImplementedError, match="transform must be defined"):
        task.transform(x)


def test_device_is_found_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=found: found)
        assert guide.device == torch.device(kind)
