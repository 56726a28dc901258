"""Whole runs on a GPU: the same as on the CPU, with DALI's GPU backend and the compiled, captured step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_fast import config as configs
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.problem import Problem
from byol_fast.config import Config
from byol_fast.data import Batch
from byol_fast.evaluate import knn_predict
from byol_fast.evaluate.retrieval import retrieval_scores
from byol_fast.export.encoder import export_run, load_encoder
from byol_fast.models import encoders
from byol_fast.models.gpu_tuning import SpaceToDepthConv2d
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.errors import TrainingError
from byol_fast.training.metrics_file import read
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.gpu import DEVICE, REHEARSING, host_syncs_are_errors, only_on_a_gpu
from tests.networks import SmallResidualNetwork
from tests.training.test_distributed import finished, torchrun

pytestmark = pytest.mark.gpu("training")

SMALL = "small_residual_network"


@pytest.fixture
def gpu(tiny: Config) -> Config:
    return configs.replace(tiny, {"device": DEVICE, "mode": "eager"})


@pytest.fixture
def small(gpu: Config) -> Config:
    """A run of a network that is compiled in seconds: what is compiled and captured in a step is all there."""
    return configs.replace(gpu, {"model.encoder": SMALL})


@pytest.fixture(autouse=True)
def _small_network_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.OWN_ENCODERS, SMALL, lambda **_: SmallResidualNetwork())


@pytest.fixture(autouse=True)
def _compiled_is_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After some variants of a function dynamo runs it eagerly and only warns: a test would compare eager with eager.

    In a rehearsal dynamo and autograd trace as on a GPU, and no code is generated.
    """
    if REHEARSING:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def mode_here(mode: str) -> str:
    """A CPU has no graphs: what would be captured is compiled and left at that."""
    return "compile" if REHEARSING and mode == "graph" else mode


def losses_in(run: Path) -> list[float]:
    """Loss of each step that was not skipped."""
    return [r["loss"] for r in read(run / "metrics.jsonl") if r.get("loss") is not None]


def losses(config: Config, **changes: object) -> list[float]:
    return losses_in(Trainer(configs.replace(config, changes)).fit().run_dir)


# ------------------------------------------------------------------------------------------------ compiled, captured

TINY = Problem(encoder=SMALL, image_size=32, batch_size=8, hidden_dim=32, projection_dim=16, device=DEVICE)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors as one long vector."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


def state_of(ours: ByolFastStep) -> dict[str, list[Tensor]]:
    """All that a step changes, by kind."""
    model, optimizer = ours.model, ours.step.optimizer
    momentum = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    return {
        "online weights": list(model.online.parameters()),
        "target weights": list(model.target.parameters()),
        "statistics": [b for b in model.buffers() if b.is_floating_point()],
        "counters": [b for b in model.buffers() if not b.is_floating_point()],
        "momentum": [v for v in momentum if v.dim()],
    }


@pytest.mark.gpu("step")
@pytest.mark.parametrize(
    ("mode", "optimizer", "batched"),
    [("compile", "lars", True), ("graph", "lars", True), ("graph", "lars", False), ("graph", "sgd", True)],
)
def test_weights_after_steps_of_every_mode_are_the_eager_ones(mode: str, optimizer: str, batched: bool) -> None:
    """In float64, where nothing hides behind rounding, with rates that move: all that four steps change."""
    eager, other = (
        ByolFastStep(TINY, dtype=torch.float64, optimizer=optimizer, mode=m, batched=batched)
        for m in ("eager", mode_here(mode))
    )
    for ours in (eager, other):
        ours.step.schedule = RunSchedule(total_steps=6, warmup_steps=2, base_lr=0.2, tau_base=0.9)
    start = [p.detach().clone() for p in eager.model.online.parameters()]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        shape = (TINY.batch_size, 3, TINY.image_size, TINY.image_size)
        view1, view2 = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(DEVICE)
        batch = Batch((view1, view2), None, torch.arange(TINY.batch_size))
        expected, found = (ours.step(batch, step) for ours in (eager, other))
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-9)
        assert distance(list(found.features), list(expected.features)) < 1e-9  # what the probe learns from
    moved = distance(start, list(eager.model.online.parameters()))
    assert moved > 1e-3
    for kind, tensors in state_of(other).items():
        # Rounding of 1e-15, amplified by four steps (LARS has its rates in fp32 on a GPU, in both modes the same); a
        # stale rate, or a step too many, would be of the size of `moved`.
        assert distance(tensors, state_of(eager)[kind]) < 1e-6 * moved, kind


@pytest.mark.gpu("step")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_every_mode_takes_the_steps_of_the_eager_one(small: Config, mode: str, precision: str) -> None:
    """Losses of six steps of a real run: rates, momentum and statistics move in a replay as they should."""
    short = {"steps": 6, "data.loader": "threaded", "optim.warmup_steps": 2, "optim.lr": 2.0, "precision": precision}
    eager = losses(small, **short, name="eager", log_every=1)
    other = losses(small, **short, name=mode, mode=mode_here(mode), log_every=1)
    assert_alike(other, eager, precision)


def assert_alike(found: list[float], expected: list[float], precision: str) -> None:
    """Losses of six steps as other sums of the same terms give them; float64 shows the rest (above)."""
    assert len(found) == len(expected) == 6
    # One step: half a unit of the sums' last digit for each of some thousand terms, in bf16 half a percent for what
    # inductor does not round between two operations. Six: what these steps amplify, a factor of ten and more. With
    # weights that stand still the last loss would differ by 14 %, with rates of the step before by 1 %.
    first = 1e-5 if precision == "fp32" else 5e-3
    assert found[0] == pytest.approx(expected[0], rel=first)
    assert found == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 5e-2)


@pytest.mark.gpu("step")
def test_weight_copies_follow_in_a_graph() -> None:
    """LARS writes the weights in bf16 in the same pass; the next step's forward pass reads only those."""
    ours = ByolFastStep(TINY, precision="bf16", mode=mode_here("graph"))
    assert ours.step.lowp_weights is not None
    # Detached: a living autograd graph ties its leaves to the stream it was made on, which a capture must not wait for.
    before = [c.detach().clone() for c in ours.step.lowp_weights.copies.values()]
    for _ in range(3):
        ours()
    assert all(torch.equal(copy, weight.to(copy.dtype)) for weight, copy in ours.step.lowp_weights.copies.items())
    assert any(not torch.equal(a, b) for a, b in zip(before, ours.step.lowp_weights.copies.values(), strict=True))


@pytest.mark.gpu("step")
def test_gpu_and_cpu_take_the_same_first_step(gpu: Config) -> None:
    """On the same views: blur's factors are float16 on a GPU, so that one value in thirty is a level off there."""
    changes = {"data.loader": "threaded", "optim.warmup_steps": 0, "precision": "fp32"}
    trainers = [Trainer(configs.replace(gpu, {**changes, "device": d, "name": d})) for d in ("cpu", DEVICE)]
    assert isinstance(trainers[1].model.encoder.conv1, SpaceToDepthConv2d) is not REHEARSING
    batch = next(trainers[0].loader)
    on_cpu, on_gpu = (float(trainer.train_step(batch, 0).loss) for trainer in trainers)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.gpu("step")
def test_a_captured_step_costs_no_synchronization(small: Config) -> None:
    config = {"mode": mode_here("graph"), "precision": "bf16", "data.loader": "threaded"}
    trainer = Trainer(configs.replace(small, config))
    batch = next(trainer.loader)
    for k in range(3):
        trainer.train_step(batch, k)
    with host_syncs_are_errors():
        for k in range(3, 6):
            trainer.train_step(batch, k)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("loader", ["dali", "threaded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(gpu: Config, loader: str, precision: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = configs.replace(gpu, {"data.loader": loader, "precision": precision, "optim.lr": 2.0, "steps": 40})
    trainer = Trainer(config)
    assert next(trainer.model.parameters()).device.type == DEVICE
    assert trainer.loader.name.startswith(loader)
    found = losses_in(trainer.fit().run_dir)
    assert np.mean(found[-8:]) < 0.9 * np.mean(found[:8])


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_a_captured_step_that_is_not_finite_is_undone(small: Config, optimizer: str) -> None:
    config = configs.replace(
        small, {"mode": mode_here("graph"), "optim.name": optimizer, "data.loader": "threaded", "precision": "fp32"}
    )
    trainer = Trainer(config)
    step, loader = trainer.train_step, trainer.loader
    first, second = (next(loader) for _ in range(2))
    ready = [Batch((b.views[0].float() / 255, b.views[1].float() / 255), b.labels, b.index) for b in (first, second)]
    assert step(ready[0], 0).skipped.item() == 0
    before = [t.detach().clone() for t in step.mutable_tensors() if t is not step.found_inf]
    poisoned = ready[1].views[0].clone()
    poisoned[1, 2, 3, 4] = math.nan
    assert step(Batch((poisoned, ready[1].views[1]), ready[1].labels, ready[1].index), 1).skipped.item() == 1
    for was, now in zip(before, (t for t in step.mutable_tensors() if t is not step.found_inf), strict=True):
        assert torch.equal(was, now)
    assert step(ready[1], 2).skipped.item() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, step.mutable_tensors(), strict=False))


def test_fp16_and_recomputation_train(gpu: Config) -> None:
    for name, changes in (
        ("fp16", {"precision": "fp16"}),
        ("recomputed", {"activation_checkpointing": True, "precision": "bf16"}),
        ("accumulated", {"grad_accum_steps": 2, "precision": "bf16"}),
    ):
        if REHEARSING and name == "fp16":
            continue  # CPUs have no fp16 training
        found = losses(gpu, name=name, steps=30, **{"optim.lr": 2.0, "data.loader": "threaded"}, **changes)
        assert len(found) >= (20 if name == "fp16" else 30), name  # fp16 skips steps until its scale fits
        assert np.mean(found[-8:]) < np.mean(found[:8]), name


def test_a_batch_that_does_not_fit_says_which_one_would(gpu: Config) -> None:
    only_on_a_gpu("a CPU's memory has no such limit")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 2**28) / total)
    try:
        view = {"size": 128, "blur_p": 0.0}
        big = {
            "view1": view,
            "view2": view,
            "batch_size": 60,
            "model.encoder": "resnet50",
            "data.loader": "threaded",
        }
        with pytest.raises(
            TrainingError, match=r"does not fit .*--batch-size \d+ --grad-accum-steps|not even 2 images fit"
        ):
            Trainer(configs.replace(gpu, big)).fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.gpu("resume")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_resumed_run_goes_on_where_it_stopped(small: Config, mode: str) -> None:
    small = configs.replace(small, {"mode": mode_here(mode), "precision": "fp32", "data.loader": "threaded"})
    whole = losses(small, name="whole")
    half = configs.replace(small, {"name": "half", "checkpoint_every": 6})
    trainer = Trainer(half)
    trainer.total_steps = 6  # as if killed there: the schedules still count to 12
    run = trainer.fit().run_dir
    saved = checkpoints.use_latest(run / "checkpoints", checkpoints.load)
    resumed = Trainer(half, resume=run)
    assert resumed.state.step == 6
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight.cpu(), saved["model"][name].cpu()), name
    resumed.fit()
    # cuDNN's sums are not repeatable and training amplifies them; another batch or schedule would differ by tenths.
    assert losses_in(run) == pytest.approx(whole, rel=0.02)


# ------------------------------------------------------------------------------------------------ several processes

ONE_OF_ONE = """
from byol_fast.training import distributed
# A world of one does all that several do: it joins a group, wraps the network, synchronizes statistics, votes.
distributed.started_by_torchrun = lambda: True
distributed.World.is_single = property(lambda self: False)
"""


@pytest.mark.gpu("ddp")
def test_one_rank_trains_as_a_process_alone(gpu: Config) -> None:
    changes = {"optim.lr": 0.2, "steps": 5, "data.loader": "threaded", "precision": "fp32", "log_every": 1}
    alone = configs.replace(gpu, {**changes, "name": "alone"})
    ranked = configs.replace(gpu, {**changes, "name": "ranked"})
    output = finished(torchrun(ranked, 1, before=ONE_OF_ONE))
    assert "x 1 processes" in output
    run = Trainer(alone).fit().run_dir
    assert losses_in(ranked.out / "ranked") == pytest.approx(losses_in(run), rel=1e-4)
    a, b = (checkpoints.use_latest(c.out / c.name / "checkpoints", checkpoints.load)["model"] for c in (alone, ranked))
    start = Trainer(configs.replace(alone, {"name": "start"})).model.state_dict()
    names = [name for name in a if a[name].is_floating_point()]
    moved = distance([a[n].cpu() for n in names], [start[n].cpu() for n in names])
    # Rounding, amplified by five steps; one all-reduce too many or too few would be of the size of `moved`.
    assert distance([b[n].cpu() for n in names], [a[n].cpu() for n in names]) < 0.02 * moved


# ------------------------------------------------------------------------------------------------ what a run is for


@pytest.mark.gpu("knn")
@pytest.mark.parametrize("k", [1, 20, 200])
def test_neighbors_are_those_of_the_cpu(k: int) -> None:
    """Against float64 there: random features have no ties, and a TF32 product would swap neighbors."""
    generator = torch.Generator().manual_seed(k)
    centers = torch.randn(10, 128, generator=generator)
    train_y, test_y = (torch.randint(0, 10, (n,), generator=generator) for n in (5000, 1000))
    train_x, test_x = (centers[y] + 2 * torch.randn(len(y), 128, generator=generator) for y in (train_y, test_y))
    settings: dict[str, Any] = {"k": k, "temperature": 0.07, "num_classes": 10}
    expected = knn_predict(train_x.double(), train_y, test_x.double(), **settings)
    found = knn_predict(train_x.to(DEVICE), train_y.to(DEVICE), test_x.to(DEVICE), **settings, chunk=300)
    assert found.device.type == DEVICE
    assert (found[:, 0].cpu() == expected[:, 0]).float().mean() >= 0.999  # two votes may be a rounding apart
    accuracy = [(ranking[:, 0].cpu() == test_y).float().mean() for ranking in (found, expected)]
    assert accuracy[1] > 0.5 and abs(accuracy[0] - accuracy[1]) <= 0.001


@pytest.mark.gpu("knn")
def test_retrieval_is_that_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 20, (2000,), generator=generator)
    x = torch.randn(20, 128, generator=generator)[y] + 2 * torch.randn(2000, 128, generator=generator)
    expected = retrieval_scores("x", x, y)
    scores = retrieval_scores("x", x.to(DEVICE), y.to(DEVICE), max_similarities=300 * 2000)
    assert (scores.num_queries, scores.num_left_out) == (2000, 0)
    assert 0.2 < expected.mean_ap < 0.9 and abs(scores.mean_ap - expected.mean_ap) < 1e-4
    for ours, theirs in zip(scores.recall, expected.recall, strict=True):
        assert abs(ours.recall - theirs.recall) <= 0.001  # two similarities may be a rounding apart


@pytest.mark.gpu("knn")
def test_the_neighbors_of_a_run_are_found(gpu: Config, photos: np.ndarray, tmp_path: Path) -> None:
    val = tmp_path / "val.npz"
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    run = Trainer(configs.replace(gpu, {"steps": 4, "knn": {"val_root": val, "k": 1}})).fit().run_dir
    found = [r["knn_top1"] for r in read(run / "metrics.jsonl") if "knn_top1" in r]
    assert len(found) == 2  # untrained, trained
    assert found == [1.0, 1.0]  # every image's nearest neighbor among the training images is itself


@pytest.mark.gpu("export")
def test_the_exported_encoder_is_the_trained_one(gpu: Config, tmp_path: Path) -> None:
    trainer = Trainer(configs.replace(gpu, {"steps": 4, "model.encoder": "resnet18"}))
    run = trainer.fit().run_dir
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = features(trainer.model.encoder.cpu().to(memory_format=torch.contiguous_format), x)
        for folder in (run, export_run(run, tmp_path / "again")[0].parent):
            encoder, about = load_encoder(folder)
            assert about["step"] == 4
            assert not any(p.is_cuda for p in encoder.parameters())
            assert torch.equal(features(encoder, x), expected)
        on_gpu = features(encoder.to(DEVICE), x.to(DEVICE)).cpu()
    assert distance([on_gpu], [expected]) < 5e-3  # cuDNN may multiply in TF32


@pytest.mark.gpu("export")
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_programs_of_an_encoder_that_a_gpu_trained(gpu: Config, tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"{name} is not installed")
    from byol_fast.export.formats import MAX_DIFFERENCE, export_as

    run = Trainer(configs.replace(gpu, {"steps": 2})).fit().run_dir
    encoder, about = load_encoder(run)
    made = export_as(encoder, about, kind, tmp_path)
    assert made.difference is not None and made.difference <= MAX_DIFFERENCE * made.largest


def features(encoder: nn.Module, x: Tensor) -> Tensor:
    """Features of images, computed as for an evaluation."""
    out: Tensor = encoder.eval()(x).flatten(1)
    return out
