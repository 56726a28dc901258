"""The step beyond the plain case: steps that must not happen, sums of batches, low precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_ops import outside_forward_and_backward
from byol_fast.config import OptimConfig
from byol_fast.config.fields import ViewBatching
from byol_fast.data import Batch
from byol_fast.models.base import ModelOutput
from byol_fast.models.byol import BYOL
from byol_fast.models.simsiam import SimSiam
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.cuda_graph import restore_state_after
from byol_fast.training.lowp_weights import LowPrecisionWeights
from byol_fast.training.memory import largest_that_fits
from byol_fast.training.mode import Mode, compile_forward
from byol_fast.training.train_step import TrainStep
from tests.training.helpers import BF16, FP16, SCHEDULE, batches, everything, poisoned, small_byol, train_step


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adam", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(optimizer: str) -> None:
    """Weights, momentum, target and the running statistics of both networks are those from before the step."""
    good, also_good, bad = batches(3)
    model = small_byol()
    step = train_step(model, optimizer=optimizer)
    assert step(good, 0).skipped == 0
    before = everything(step)
    metrics = step(poisoned(bad), 1)
    assert metrics.skipped == 1
    assert not torch.isfinite(metrics.loss)
    for was, now in zip(before, everything(step), strict=True):
        assert torch.equal(was, now)
    assert (metrics.lr, metrics.tau) == (SCHEDULE.lr(1), SCHEDULE.tau(1))
    # The run without the bad batch, its third step taken at the same point of the schedules.
    clean = train_step(small_byol(), optimizer=optimizer)
    clean(good, 0)
    assert torch.equal(step(also_good, 2).values, clean(also_good, 2).values)
    for a, b in zip(everything(step), everything(clean), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "sgd without momentum", "adam", "adamw"])
def test_a_first_step_that_is_not_finite_leaves_the_optimizer_fresh(optimizer: str, loads: bool) -> None:
    """fp16's first step is one, as a rule: its scale is found by overflowing."""
    good, bad = batches(2)
    name, _, without_momentum = optimizer.partition(" ")
    results = []
    for first in (poisoned(bad), None):
        step = train_step(small_byol(), optimizer=name, momentum=0.0 if without_momentum else 0.9)
        if loads:  # of torch's SGD before its first step
            step.optimizer.load_state_dict(step.optimizer.state_dict() | {"state": {}})
        if first is not None:
            # What an optimizer leaves uninitialized shows with certainty.
            torch.use_deterministic_algorithms(True)
            try:
                assert step(first, 0).skipped == 1
            finally:
                torch.use_deterministic_algorithms(False)
        step(good, 0)
        step(good, 1)
        results.append(everything(step))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_group_added_later_begins_with_momentum_of_zero() -> None:
    first, second = (nn.Parameter(torch.ones(1000)) for _ in range(2))
    sgd = build_optimizer(OptimConfig(name="sgd"), [first])
    sgd.add_param_group({"params": [second], "lr": 0.5})
    assert torch.equal(sgd.state[second]["momentum_buffer"], torch.zeros(1000))
    second.grad = torch.ones(1000)
    for found_inf in (1.0, 0.0):
        sgd.found_inf, sgd.grad_scale = torch.tensor(found_inf), None  # type: ignore[attr-defined]
        sgd.step()
    assert torch.equal(second, torch.full((1000,), 0.5))


def test_a_gradient_that_overflows_behind_a_finite_loss_is_undone_too() -> None:
    (good,) = batches(1)
    step = train_step(small_byol())
    step(good, 0)
    before = everything(step)
    hook = next(step.model.parameters()).register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
    metrics = step(good, 1)
    assert torch.isfinite(metrics.loss)
    assert metrics.skipped == 1
    hook.remove()
    for was, now in zip(before, everything(step), strict=True):
        assert torch.equal(was, now)


def test_four_batches_at_a_time_are_the_mean_of_their_gradients_and_one_average() -> None:
    """Against a loop written out: gradients averaged, one optimizer step, one move of the target, in float64."""
    four = batches(4)
    ours = small_byol().double()
    step = train_step(ours, grad_accum_steps=4)
    metrics = [step(four, k) for k in range(2)]

    model = small_byol().double()
    optimizer = build_optimizer(OptimConfig(weight_decay=0.01, trust_coefficient=0.1), model.trainable_parameters())
    for k in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for batch in four:
            p1, p2, z1, z2 = model(batch.views[0], batch.views[1])
            loss = model.loss((p1, p2), (z1, z2)) / 4
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.lr(k)
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(SCHEDULE.tau(k))
        assert metrics[k].loss == pytest.approx(float(total), rel=1e-12)
    for (name, a), b in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
    norm = next(m for m in ours.online.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2 * 4 * 2  # steps, batches, views


def test_weight_copies_give_the_numbers_of_autocast() -> None:
    """The same casts, made once by the optimizer instead of in every step: the same forward pass bit for bit, and
    gradients that differ by bf16's rounding at most (oneDNN may choose another algorithm)."""
    data = batches(1)
    states = []
    for with_copies in (True, False):
        step = train_step(small_byol(), precision=BF16, lowp_weights=with_copies)
        assert (step.lowp_weights is not None) == with_copies
        losses = [float(step(batch, k).loss) for k, batch in enumerate(data)]
        states.append((losses, step.model.state_dict()))
    (losses_a, a), (losses_b, b) = states
    assert losses_a == losses_b
    start = small_byol().state_dict()
    for name, weight in step.model.named_parameters():
        if weight.ndim > 1 and name.startswith("online"):
            moved = (b[name] - start[name]).norm()
            assert (a[name] - b[name]).norm() < 2**-6 * moved, name


def test_weight_copies_of_shared_weights_get_the_gradients_of_all_uses() -> None:
    """Those of layers without a copy arrive at the weight itself."""

    class Transposed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    gradients: list[torch.Tensor] = []
    for with_copies in (True, False):
        torch.manual_seed(0)
        linear = nn.Linear(48, 8, bias=False)
        encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear, nn.ReLU(), Transposed(linear))
        model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=32)
        step = train_step(model, precision=BF16, lowp_weights=with_copies)
        step.optimizer.register_step_pre_hook(lambda *_, w=linear.weight: gradients.append(w.grad.float()))
        step(batches(1)[0], 0)
    copies, autocast = gradients
    assert (copies - autocast).norm() < 2**-7 * autocast.norm()


def test_weight_copies_leave_a_model_that_others_can_train() -> None:
    """In full precision: gradients of the weights themselves are float32."""
    model = small_byol()
    train_step(model, precision=BF16)(batches(1)[0], 0)
    model.forward_train(*batches(1)[0].views).loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == dict.fromkeys(gradients, torch.float32)
    assert len(gradients) == len(model.trainable_parameters())


def test_weight_copies_follow_weights_that_are_loaded() -> None:
    model, other = small_byol(), small_byol()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    step = train_step(model, precision=BF16)
    model.load_state_dict(other.state_dict())
    step.on_weights_loaded()
    assert isinstance(step.lowp_weights, LowPrecisionWeights)
    for weight, low in step.lowp_weights.copies.items():
        assert torch.equal(weight.to(torch.bfloat16), low)
    with step.lowp_weights.swapped_in():
        assert model.online.encoder.get_submodule("conv1").weight.dtype == torch.bfloat16
    assert model.online.encoder.get_submodule("conv1").weight.dtype == torch.float32


def test_fp16_scales_the_loss_backs_off_and_comes_close_to_fp32() -> None:
    data = batches(3)
    half = train_step(small_byol(), precision=FP16)
    full = train_step(small_byol())
    assert half.grad_scaler is not None
    assert half(data[0], 0).skipped == 1  # the first scale is found by overflowing
    assert half.grad_scaler.scale == 32768.0
    half.grad_scaler.scale.fill_(1024.0)
    losses = [(float(half(b, k).loss), float(full(b, k).loss)) for k, b in enumerate(data)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=5e-3)  # fp16 keeps 11 bits
    assert half.grad_scaler.scale == 1024.0
    before = everything(half)
    half(poisoned(data[0]), 3)
    assert half.grad_scaler.scale == 512.0
    for was, now in list(zip(before, everything(half), strict=True))[: len(list(half.model.parameters()))]:
        assert torch.equal(was, now)
    again = train_step(small_byol(), precision=FP16)
    assert again.grad_scaler is not None
    again.grad_scaler.load_state_dict(half.grad_scaler.state_dict())
    assert again.grad_scaler.scale == 512.0


def test_the_loss_scale_grows_after_2000_good_steps() -> None:
    step = train_step(small_byol(), precision=FP16)
    assert step.grad_scaler is not None
    good = torch.zeros(())
    for _ in range(2000):
        step.grad_scaler.update(good)
    assert step.grad_scaler.scale == 2 * 65536.0


@pytest.mark.parametrize("views", ["batched", "separate"])
def test_running_statistics_are_moved_by_one_launch(views: ViewBatching) -> None:
    """A CUDA graph can hold one of lists that look the same."""
    moves: list[str] = []

    class Moves(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "update_running_stats_" in str(func):
                moves.append(str(func))
            return func(*args, **(kwargs or {}))

    step = train_step(small_byol(views), grad_accum_steps=2)
    with Moves():  # type: ignore[no-untyped-call]
        step(batches(2), 0)
    assert len(moves) == 1


class OwnForward(BYOL):
    """A method whose training forward pass is replaced."""

    returned: dict[str, Any]

    def forward_train(self, *views: torch.Tensor) -> ModelOutput:
        return super().forward_train(*views)._replace(**self.returned)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        # The running statistics would move in steps that are skipped.
        ({"batch_stats": None}, r"OwnForward.forward_train must return batch_stats"),
        (
            {"features": None},
            r"OwnForward.forward_train must return features of both global views, \[16, D\], got None",
        ),
        # The probe would compare them with the labels of other images.
        (
            {"features": torch.zeros(4, 256)},
            r"OwnForward.forward_train must return features of both global views, \[16, D\]",
        ),
    ],
)
def test_a_method_with_an_incomplete_output_is_refused(returned: dict[str, Any], message: str) -> None:
    (batch,) = batches(1)
    model = OwnForward("resnet18_narrow", hidden_dim=16, projection_dim=8, image_size=32)
    model.returned = returned
    with pytest.raises(ValueError, match=message):
        train_step(model)(batch, 0)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_step_leaves_no_flag_behind(optimizer: str) -> None:
    """The optimizer of a run can be stepped by its owner, also after a step that was skipped."""
    (bad,) = batches(1)
    step = train_step(small_byol(), optimizer=optimizer)
    assert step(poisoned(bad), 0).skipped == 1
    weight = step.parameters[0]
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    step.optimizer.step()
    assert not torch.equal(weight, before)


def test_the_largest_batch_that_fits_is_found_without_compiling() -> None:
    """Each size would be compiled anew, which takes longer than the run has left to live."""
    (batch,) = batches(1)
    model = small_byol()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    step = train_step(model, forward=torch.compile(model.forward_train, backend=backend))
    assert largest_that_fits(step, batch) == 4
    assert not graphs
    step.forward_backward(batch.views)
    assert graphs


def test_warm_up_leaves_no_trace() -> None:
    """Warm-up steps before the capture of a CUDA graph change nothing."""
    first, second = batches(2)
    model = small_byol()
    step, clean = train_step(model), train_step(copy.deepcopy(model))
    numbers = torch.get_rng_state()

    def warm_up() -> None:
        for _ in range(3):
            step(second, 3)

    restore_state_after(warm_up, step.mutable_tensors, torch.device("cpu"))
    assert torch.equal(numbers, torch.get_rng_state())
    for k, batch in enumerate((first, second)):
        assert torch.equal(step(batch, k).values, clean(batch, k).values)
    for a, b in zip(everything(step), everything(clean), strict=True):
        assert torch.equal(a, b)


def test_simsiam_is_its_formula() -> None:
    """-(cos(p1, z2) + cos(p2, z1)) / 2 with no gradient through z, in torch's own operators."""
    torch.manual_seed(0)
    model = SimSiam("resnet18_narrow", hidden_dim=16, projection_dim=12, predictor_hidden_dim=6, image_size=32).double()
    (batch,) = batches(1)
    assert not model.target_parameters()
    output = model.forward_train(batch.views[0], batch.views[1])
    p1, p2, z1, z2 = model(batch.views[0], batch.views[1])
    assert model.loss((p1, p2), (z1, z2)).item() == pytest.approx(output.loss.item(), rel=1e-12)
    output.loss.backward()  # type: ignore[no-untyped-call]
    ours = [p.grad.clone() for p in model.online.parameters() if p.grad is not None]
    assert len(ours) == len(list(model.online.parameters()))

    model.zero_grad()
    x1, x2 = (model.normalize(v) for v in (batch.views[0], batch.views[1]))
    (z1, z2), (p1, p2), _ = model.online(x1, x2)
    cosine = nn.functional.cosine_similarity
    loss = -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for a, p in zip(ours, model.online.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


def test_what_a_step_adds_to_forward_and_backward_does_not_grow_with_the_network() -> None:
    small, large = small_byol(), BYOL("resnet34", hidden_dim=16, projection_dim=8, image_size=32)
    assert 1.5 * len(small.trainable_parameters()) < len(large.trainable_parameters())
    counted = [outside_forward_and_backward(model, 32) for model in (small, large)]
    assert counted[0] == counted[1]
    everything, update = counted[0]
    assert update == (1, 0)  # LARS with the moving average
    assert everything.ops <= 18
    assert everything.syncs <= 1  # the flag of a step to be skipped, read by a CPU only


def test_compiled_steps_equal_eager_ones() -> None:
    """In float64, where different orders of summation cannot hide a difference behind rounding."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    )
    eager = BYOL(encoder.double(), hidden_dim=8, projection_dim=4, image_size=6)
    other = copy.deepcopy(eager)
    schedule = RunSchedule(total_steps=4, base_lr=40.0, batch_size=6, tau_base=0.9)
    losses: dict[str, list[float]] = {}
    features: dict[str, torch.Tensor] = {}
    for mode, model in (("eager", eager), ("compile", other)):
        forward = compile_forward(model, Mode(mode, "for the test"))  # type: ignore[arg-type]
        optimizer = build_optimizer(OptimConfig(weight_decay=0.1, trust_coefficient=0.1), model.trainable_parameters())
        step = TrainStep(model, optimizer, schedule, forward=forward)
        generator = torch.Generator().manual_seed(1)
        losses[mode] = []
        for k in range(3):
            views = torch.randn(2, 6, 3, 6, 6, generator=generator, dtype=torch.float64)
            metrics = step(Batch((views[0], views[1]), None, torch.arange(6)), k)
            losses[mode].append(float(metrics.loss))
            (features[mode],) = metrics.features
    assert losses["compile"] == pytest.approx(losses["eager"], rel=1e-12)
    assert losses["eager"][0] != losses["eager"][2]
    torch.testing.assert_close(features["compile"], features["eager"], rtol=1e-10, atol=1e-12)
    for (name, a), b in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12, msg=name)
