"""The training loops of the documents as printed, with a small network: their optimizer steps beside plain torch."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import cosine_similarity

import byol_fast
import byol_kernels
from byol_fast import models
from tests.networks import SmallResidualNetwork
from tests.test_examples import run

LR = 0.2
ACCUMULATE = 2
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
REASON = "pip install '.[peers]'"


def small_byol(dtype: torch.dtype = torch.float64) -> byol_fast.BYOL:
    torch.manual_seed(0)
    return models.BYOL(SmallResidualNetwork(), image_size=32, hidden_dim=16, projection_dim=8).to(dtype)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents' models are small ones in float64."""
    monkeypatch.setattr(byol_fast, "BYOL", lambda encoder, image_size: small_byol())


def views(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 2, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [(pair[0], pair[1]) for pair in pixels]


def tau_after(steps: int, total_steps: int) -> float:
    return 1 - 0.004 * (math.cos(math.pi * steps / total_steps) + 1) / 2


def train_in_plain_torch(model: byol_fast.BYOL, accumulate: int) -> None:
    """Gradients of a few of five batches, LARS, target, and so on; the last step has what is left."""
    online, target, data = model.trainable_parameters(), model.target_parameters(), views(5)
    momentum = [torch.zeros_like(p) for p in online]
    windows = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    for step, window in enumerate(windows):
        for view1, view2 in window:
            p1, p2, z1, z2 = model(view1, view2)
            loss = (4 - 2 * cosine_similarity(p1, z2) - 2 * cosine_similarity(p2, z1)).mean()
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
        tau = tau_after(step, len(windows))
        with torch.no_grad():
            for p, v in zip(online, momentum, strict=True):
                assert p.grad is not None
                d = p.grad if p.ndim == 1 else p.grad + 1.5e-6 * p
                v.mul_(0.9).add_(d * (1 if p.ndim == 1 else 1e-3 * p.norm() / d.norm()))
                p.sub_(LR * v)
                p.grad = None
            for t, p in zip(target, online, strict=False):
                t.copy_(tau * t + (1 - tau) * p)


def assert_equal_weights(a: byol_fast.BYOL, b: byol_fast.BYOL) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.usefixtures("small")
def test_own_loop_equals_plain_torch() -> None:
    model = run("loop", your_loader=views(5))["model"]
    expected = small_byol()
    train_in_plain_torch(expected, ACCUMULATE)
    assert_equal_weights(model, expected)


@pytest.mark.parametrize("name", ["LARS", "AdamW", "fused AdamW"])
def test_target_moves_only_with_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that GradScaler skips leaves the target where it is."""
    model, tau = small_byol(), tau_after(2, 4)
    online, target = model.trainable_parameters(), model.target_parameters()
    options: dict[str, Any] = {}
    if name == "LARS":
        optimizer: Any = byol_kernels.LARS(online, lr=0.2)
        options["ema"] = (dict(zip(online, target, strict=False)), tau)
    else:
        if "fused" in name:
            monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
        optimizer = run("hook", model=model, step=2, total_steps=4)["optimizer"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for overflows in (True, False, True):
        for p in online:
            p.grad = torch.ones_like(p)
        online[3].grad = torch.full_like(online[3], math.inf if overflows else 1.0)
        before = [p.detach().clone() for p in target]
        scaler.scale(torch.ones(()))  # as for a loss
        scaler.step(optimizer, **options)
        scaler.update()
        for t, b, p in zip(target, before, online, strict=False):
            if overflows:
                assert torch.equal(t, b)
            else:
                torch.testing.assert_close(t, tau * b + (1 - tau) * p)


def train_by_lightning(monkeypatch: pytest.MonkeyPatch, batches: int, **options: Any) -> Any:
    """The trainer of the snippet after it: one epoch of some batches on the CPU, without files and progress."""
    lightning = pytest.importorskip("lightning", reason=REASON)
    trainer = lightning.Trainer(**QUIET, **{"max_epochs": 1} | options)
    monkeypatch.setattr(lightning, "Trainer", lambda max_epochs: trainer)
    loader = cast("Any", torch.utils.data.DataLoader)(views(batches), batch_size=None)
    run("Lightning", your_loader=loader)
    return trainer


@pytest.mark.peers
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_lightning_module_equals_plain_torch(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train_by_lightning(monkeypatch, 5, accumulate_grad_batches=accumulate, precision="64-true")
    expected = small_byol()
    train_in_plain_torch(expected, accumulate)
    assert_equal_weights(trainer.lightning_module.model, expected)


@pytest.mark.peers
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_hook_moves_target_once_per_step(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of another optimizer counts optimizer steps from 0."""
    lightning = pytest.importorskip("lightning", reason=REASON)
    steps: list[tuple[int, int]] = []

    class Learner(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = byol_fast.BYOL("resnet18", image_size=32)

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model.forward_train(*batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.model.trainable_parameters(), lr=LR)
            optimizer.register_step_post_hook(lambda *_: self.update_target())
            return optimizer

        def update_target(self) -> None:
            steps.append((self.global_step, int(self.trainer.estimated_stepping_batches)))
            self.model.update_target(byol_fast.optim.tau_at(*steps[-1], 0.996))

    trainer = lightning.Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Learner(), cast("Any", torch.utils.data.DataLoader)(views(5), batch_size=None))
    total = -(-5 // accumulate)
    assert steps == [(step, total) for step in range(total)]


@pytest.mark.peers
def test_skipped_lightning_step_leaves_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)
    model = small_byol(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(byol_fast, "BYOL", lambda encoder, image_size: model)
    overflows = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    fp16 = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", overflows)
    trainer = train_by_lightning(monkeypatch, 2, plugins=[fp16])
    assert trainer.global_step == 2
    assert overflows.get_scale() == 2.0**58
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_encoder_of_own_loop_is_exported_and_embeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is the module itself: its weights reach the file, and torchvision, unchanged."""
    monkeypatch.chdir(tmp_path)
    write_photographs(Path("path/to/images"))
    network = torchvision.models.resnet50()
    network.fc = torch.nn.Identity()
    model = byol_fast.BYOL(network, image_size=64, hidden_dim=8)
    assert model.encoder is network
    features = run("use your encoder", model=model, step=7)["features"]
    plain = torchvision.models.resnet50()
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(network.state_dict())
    loaded, metadata = byol_fast.load_encoder("exported")
    assert metadata["step"] == 7
    for a, b, c in zip(network.parameters(), loaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    again = byol_fast.evaluate.embed_folder((model.encoder, metadata), "path/to/images")
    assert (again.features == features).all()
    assert features.shape == (2, 2048)


def write_photographs(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("a.png", "b.png"):
        pixels = torch.randint(0, 256, (64, 80, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / name)
