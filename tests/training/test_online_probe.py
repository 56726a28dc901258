"""The online probe and evaluations during training, which do not affect it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from byol_fast import Callback
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.metrics_file import read
from byol_fast.training.online_probe import EPS, OnlineProbe
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.networks import METHODS

CPU = torch.device("cpu")
RUN, SKIPPED = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)


def clusters(count: int, seed: int, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the corners of a simplex, with large means and very different scales, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    x = 4 * torch.eye(3, dim)[y] + torch.randn(count, dim, generator=generator)
    return x * torch.logspace(-2, 2, dim) + 100, y


@pytest.fixture
def evaluated(tiny: Config, npz: Path, photos: np.ndarray) -> Config:
    """The tiny run with evaluations after steps 5, 10 and 12."""
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    return configs.replace(tiny, {"knn": {"val_root": val, "every_epochs": 1, "k": 3}})


def test_probe_equals_autograd_with_adam() -> None:
    probe = OnlineProbe(12, 3, lr=0.01, device=CPU)
    weight, bias = (torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in ((3, 12), (3,)))
    adam = torch.optim.Adam([weight, bias], lr=0.01)
    for step in range(6):
        x, y = clusters(40, step)
        views = [torch.cat([x[:15], x[:15] + 1]), torch.cat([x[15:], x[15:] - 1])]  # two batches of a step
        accuracy = probe.learn(views, y, RUN)
        both, labels = torch.cat(views).double(), torch.cat([y[:15], y[:15], y[15:], y[15:]])
        both = (both - both.mean(0)) / (both.var(0, correction=0) + EPS).sqrt()
        logits = both @ weight.T + bias
        assert float(accuracy) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        adam.zero_grad()
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        adam.step()
    torch.testing.assert_close(probe.weight.double(), weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(probe.bias.double(), bias, rtol=1e-3, atol=1e-5)


def test_probe_reaches_best_accuracy_also_on_single_images() -> None:
    probe = OnlineProbe(12, 3, lr=0.01, device=CPU)
    for step in range(150):
        x, y = clusters(64, step)
        probe.learn([torch.cat([x, x])], y, RUN)
    x, y = clusters(500, 1000)
    centers = 4 * torch.eye(3, 12)
    best = float((torch.cdist((x - 100) / torch.logspace(-2, 2, 12), centers).argmin(1) == y).float().mean())
    assert probe.top1(x, y) > best - 0.02 > 0.9
    assert probe.top1(x[:1], y[:1]) in {0.0, 1.0}


@pytest.mark.parametrize(("dim", "num_classes"), [(12, 4), (5, 3)])
def test_state_of_another_probe_is_refused(dim: int, num_classes: int) -> None:
    probe, other = OnlineProbe(12, 3, lr=0.01, device=CPU), OnlineProbe(dim, num_classes, lr=0.01, device=CPU)
    x, y = clusters(40, 0)
    probe.learn([torch.cat([x, x])], y, RUN)
    message = rf"probe: weight must be \[{num_classes}, {dim}\], got \[3, 12\]; training it from the start"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(probe.state_dict())
    damaged = probe.state_dict()
    damaged["optimizer"]["state"][1]["exp_avg"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"exp_avg of the optimizer's parameter 1 must be \[3\], got \[2\]"):
        OnlineProbe(12, 3, lr=0.01, device=CPU).load_state_dict(damaged)


def test_restored_probe_keeps_its_own_settings() -> None:
    probe, other = OnlineProbe(12, 3, lr=0.01, device=CPU), OnlineProbe(12, 3, lr=0.5, device=CPU)
    x, y = clusters(40, 0)
    probe.learn([torch.cat([x, x])], y, RUN)
    state = copy.deepcopy(probe.state_dict())
    del state["optimizer"]["param_groups"][0]["weight_decay"]
    other.load_state_dict(state)
    assert other.optimizer.param_groups[0]["lr"] == 0.5
    other.optimizer.param_groups[0]["lr"] = 0.01
    for p in (probe, other):
        p.learn([torch.cat([x, x])], y, RUN)
    torch.testing.assert_close(probe.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_skipped_step_does_not_train_probe() -> None:
    """Neither the first one nor one between others: all that it holds is that of a probe without these steps."""
    probe, other = (OnlineProbe(12, 3, lr=0.01, device=CPU) for _ in range(2))
    for step in range(3):
        x, y = clusters(20, step)
        probe.learn([torch.full((40, 12), torch.nan)], y, SKIPPED)
        for p in (probe, other):
            p.learn([torch.cat([x, x])], y, RUN)
        torch.testing.assert_close(probe.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_training_features_are_detached_and_equal_encoder(method: Any) -> None:
    views = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    for form in ("batched", "separate"):
        torch.manual_seed(0)
        model = method("resnet18_narrow", hidden_dim=8, projection_dim=8, image_size=32, view_batching=form)
        with torch.no_grad():
            expected = torch.cat([model.encoder(view) for view in views])  # in train mode: statistics of each view
        output = model.forward_train(*views)
        assert not output.features.requires_grad
        torch.testing.assert_close(output.features, expected, rtol=1e-4, atol=1e-5)


def test_training_is_bit_exact_with_and_without_probe(tiny: Config) -> None:
    tiny = configs.replace(tiny, {"steps": 4, "grad_accum_steps": 2, "precision": "bf16"})
    trainers = {}
    for enabled in ("off", "on"):
        trainers[enabled] = Trainer(configs.replace(tiny, {"name": enabled, "probe.enabled": enabled}))
        trainers[enabled].fit()
    states = {name: t.state.state_dict() for name, t in trainers.items()}
    probe = states["on"].pop("probe")
    assert states["off"].pop("probe") is None
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states["on"][part], states["off"][part], rtol=0, atol=0)
    assert torch.equal(states["on"]["processes"][0]["rng"], states["off"]["processes"][0]["rng"])
    assert probe["steps"] == 4
    assert bool(probe["weight"].any())
    on, off = (read(t.run_dir / "metrics.jsonl") for t in (trainers["on"], trainers["off"]))
    assert [r["loss"] for r in on] == [r["loss"] for r in off]
    assert all(0 <= r["probe_top1"] <= 1 for r in on)
    assert not any("probe_top1" in r for r in off)


def test_resumed_run_restores_probe_or_starts_one(tiny: Config) -> None:
    tiny = configs.replace(tiny, {"steps": 8})
    whole = Trainer(configs.replace(tiny, {"name": "whole"}))
    whole.fit()
    folder = whole.run_dir / "checkpoints"
    expected = read(whole.run_dir / "metrics.jsonl")
    end = checkpoints.load(checkpoints.path_at_step(folder, 8))
    checkpoints.path_at_step(folder, 8).unlink()
    Trainer(configs.replace(tiny, {"name": "whole"}), resume=whole.run_dir).fit()
    resumed = checkpoints.load(checkpoints.path_at_step(folder, 8))
    torch.testing.assert_close(resumed["probe"], end["probe"], rtol=0, atol=0)
    records = read(whole.run_dir / "metrics.jsonl")
    assert [r["probe_top1"] for r in records] == [r["probe_top1"] for r in expected]

    checkpoints.path_at_step(folder, 8).unlink()
    older = checkpoints.load(checkpoints.path_at_step(folder, 5)) | {"probe": None}
    checkpoints.save(folder, 5, {k: v for k, v in older.items() if k not in {"format", "step"}}, keep=3)
    Trainer(configs.replace(tiny, {"name": "whole"}), resume=whole.run_dir).fit()
    again = checkpoints.load(checkpoints.path_at_step(folder, 8))
    assert again["probe"]["steps"] == 3
    torch.testing.assert_close(again["model"], end["model"], rtol=0, atol=0)


def test_probe_needs_labels(tiny: Config, photos: np.ndarray) -> None:
    unlabeled = configs.replace(tiny, {"data.root": None})
    assert Trainer(unlabeled, data=photos).state.probe is None
    with pytest.raises(ConfigError, match="probe.enabled is 'on', but the training images have no labels"):
        Trainer(configs.replace(unlabeled, {"probe.enabled": "on", "name": "on"}), data=photos)


class Recorder(Callback):
    """Records checkpoints and evaluations, and fails after the evaluation of a step."""

    def __init__(self, fail_at: int = -1) -> None:
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.fail_at = fail_at

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.saved.append(trainer.state.step)

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.evaluated.append(record["step"])
        if record["step"] == self.fail_at:
            raise RuntimeError("crash")


def test_probe_of_too_many_classes_is_left_out(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Trainer(tiny).model.feature_dim
    monkeypatch.setattr("byol_fast.training.builder.MAX_WEIGHTS", 2 * size)
    trainer = Trainer(configs.replace(tiny, {"name": "other"}))
    assert trainer.state.probe is None
    with pytest.raises(ConfigError, match="'on', but 3 classes are more than it is trained for, 2; are they numbers"):
        Trainer(configs.replace(tiny, {"name": "third", "probe.enabled": "on"}))


def test_crash_after_evaluation_does_not_repeat_it(evaluated: Config) -> None:
    recorder = Recorder()
    run = Trainer(evaluated, callbacks=[recorder]).fit().run_dir
    assert recorder.evaluated == [0, 5, 10, 12]
    assert recorder.saved == [5, 10, 12]
    records = read(run / "metrics.jsonl")
    evaluations = [r for r in records if "knn_top1" in r]
    assert all(1 <= r["rankme"] <= 60 for r in evaluations)
    assert ["probe_val_top1" in r for r in evaluations] == [False, True, True, True]
    (best,) = (run / "checkpoints").glob("best_*")

    for step in (10, 12):
        shutil.rmtree(run)
        with pytest.raises(RuntimeError, match="crash"):
            Trainer(evaluated, callbacks=[Recorder(fail_at=step)]).fit()
        recorder = Recorder()
        Trainer(evaluated, resume=run, callbacks=[recorder]).fit()
        assert recorder.evaluated == [s for s in (10, 12) if s > step]
        timings = {"images_per_second", "data_wait", "peak_memory_gib"}
        assert [{k: v for k, v in r.items() if k not in timings} for r in read(run / "metrics.jsonl")] == [
            {k: v for k, v in r.items() if k not in timings} for r in records
        ]
        assert list((run / "checkpoints").glob("best_*")) == [best]
        assert checkpoints.load(best)["step"] == int(best.stem.rpartition("_")[2])
