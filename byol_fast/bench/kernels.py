"""Suites of the loss, EMA and LARS, with the operators of torch and of other libraries.

Correctness is checked before anything is timed. Sizes are those of ResNet-50 with the paper's heads: 35 M parameters in
169 tensors under LARS, 33 M in 164 under the EMA. Candidates of a suite work on the same memory, because the placement
of tensors changes times as much as many optimizations. `pip install '.[peers]'` installs the other libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from byol_fast.bench.baseline import baseline_loss, loop_ema
from byol_fast.bench.counting import Case, Suite, check_agreement, is_installed
from byol_fast.bench.problem import MOMENTUM, TAU
from byol_fast.models.byol import BYOL
from byol_kernels import LARS, byol_loss, ema_update_

LR, DECAY, TRUST_COEFFICIENT = 0.1, 1e-6, 1e-3
Loss = Callable[..., Tensor]
NUM_LOCAL_VIEWS = 6


class LoopLARS(torch.optim.Optimizer):
    """LARS as a loop over tensors that reads two norms per tensor on the host: a candidate, not a reference."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Take one step by the rule of `byol_kernels.LARS`."""
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=DECAY)
                    weight_norm, update_norm = torch.norm(p).item(), torch.norm(update).item()
                    if weight_norm > 0 and update_norm > 0:
                        update = update.mul(TRUST_COEFFICIENT * weight_norm / update_norm)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(MOMENTUM).add_(update)
                p.add_(state["momentum_buffer"], alpha=-LR)


@torch.no_grad()
def foreach_ema(target: list[Tensor], online: list[Tensor]) -> None:
    """EMA by two operators over lists of tensors."""
    torch._foreach_mul_(target, TAU)
    torch._foreach_add_(target, online, alpha=1 - TAU)


class Weights:
    """Parameters of a BYOL model with gradients, its target, and momentum buffers.

    Args:
        device: of the tensors.
        encoder: name of a torchvision model.
    """

    def __init__(self, device: str, encoder: str = "resnet50") -> None:
        torch.manual_seed(0)
        model = BYOL(encoder)
        self.online: list[nn.Parameter] = [nn.Parameter(p.detach().to(device)) for p in model.trainable_parameters()]
        for i, p in enumerate(self.online):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.grad = (noise * 1e-3).to(device)
        self.averaged = self.online[: len(model.target_parameters())]
        self.target = [torch.zeros_like(p) for p in self.averaged]
        self.momentum = [torch.zeros_like(p) for p in self.online]
        self._start = [p.detach().clone() for p in self.online]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Restore the initial state: zero momentum, and a target that differs from the online weights."""
        torch._foreach_copy_([*self.online], self._start)
        torch._foreach_zero_(self.momentum)
        torch._foreach_copy_(self.target, self._start[: len(self.target)])
        torch._foreach_mul_(self.target, 0.9)

    def share_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Use the momentum buffers as the state of an optimizer."""
        for p, v in zip(self.online, self.momentum, strict=True):
            optimizer.state[p]["momentum_buffer"] = v

    def results_of(self, case: Case) -> list[Tensor]:
        """Weights and target after one call from the initial state."""
        self.reset()
        case()
        return [x.detach().clone() for x in (*self.online, *self.target)]

    def groups(self) -> list[dict[str, object]]:
        """Parameter groups for other libraries: without decay and adaptation for biases and norms."""
        return [
            {"params": [p for p in self.online if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in self.online if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Online and target parameters as modules."""
        target = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in self.target)
        return nn.ParameterList(self.averaged), target


def timm_ema(w: Weights) -> Case:
    """EMA of the parameters by timm, on the same memory."""
    from timm.utils.model_ema import ModelEmaV3

    online, target = w.modules()
    ema = ModelEmaV3(online, decay=TAU, exclude_buffers=True)
    for parameter, shared in zip(ema.module.parameters(), target.parameters(), strict=True):
        parameter.data = shared.data
    return lambda: ema.update(online)


def optimizer_suite(device: str) -> Suite:
    """LARS and the EMA of the target, by byol_fast, lightly, timm and a loop."""
    w = Weights(device)
    fused = LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST_COEFFICIENT)
    loop = LoopLARS(w.online)
    w.share_momentum(fused)
    w.share_momentum(loop)
    target_of = dict(zip(w.averaged, w.target, strict=True))

    def run_loop() -> None:
        loop.step()
        foreach_ema(w.target, list(w.averaged))

    copies = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (*w.online, *w.target)}
    cases: dict[str, Case] = {
        "byol_fast: LARS.step(ema=...)": lambda: fused.step(ema=(target_of, TAU)),
        "byol_fast: LARS.step(ema=..., copies=...), bfloat16": lambda: fused.step(ema=(target_of, TAU), copies=copies),
    }
    tolerances = {}
    if is_installed("lightly"):
        from lightly.models.utils import update_momentum
        from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

        lightly, (online, target) = LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM), w.modules()
        w.share_momentum(lightly)

        def run_lightly() -> None:
            lightly.step()
            update_momentum(online, target, TAU)

        cases["lightly: LARS, update_momentum"] = run_lightly
        # Its ratio is |p| / (|g| + decay |p|), not |p| / |g + decay p|.
        tolerances["lightly: LARS, update_momentum"] = 1e-4
    if is_installed("timm"):
        from timm.optim.lars import Lars

        timm, ema = Lars(w.groups(), lr=LR, momentum=MOMENTUM), timm_ema(w)
        w.share_momentum(timm)

        def run_timm() -> None:
            timm.step()
            ema()

        cases["timm: Lars, ModelEmaV3"] = run_timm
        tolerances["timm: Lars, ModelEmaV3"] = 1e-4
    cases["loop: LARS with .item(), foreach mul+add"] = run_loop

    first, *others = cases
    expected = w.results_of(cases[first])
    for other in others:
        check_agreement(other, w.results_of(cases[other]), expected, tolerances.get(other, 1e-5))
    w.reset()
    min_bytes = 20 * sum(p.numel() for p in w.online) + 8 * sum(p.numel() for p in w.averaged)
    return Suite(cases, min_bytes, baseline="loop: LARS with .item(), foreach mul+add")


def ema_suite(device: str) -> Suite:
    """EMA alone."""
    w = Weights(device)
    online: list[Tensor] = list(w.averaged)
    with torch.no_grad():
        separate = [t.clone() for t in w.target]  # the loop replaces the memory of its targets at each call
    cases: dict[str, Case] = {
        "byol_fast: ema_update_": lambda: ema_update_(w.target, online, TAU),
        "torch._foreach_lerp_": torch.no_grad()(lambda: torch._foreach_lerp_(w.target, online, 1 - TAU)),
        "foreach mul+add": lambda: foreach_ema(w.target, online),
    }
    if is_installed("timm"):
        cases["timm: ModelEmaV3"] = timm_ema(w)
    if is_installed("lightly"):
        from lightly.models.utils import update_momentum

        modules = w.modules()
        cases["lightly: update_momentum"] = lambda: update_momentum(*modules, TAU)
    first, *others = cases
    expected = w.results_of(cases[first])
    for other in others:
        check_agreement(other, w.results_of(cases[other]), expected, 1e-6)
    w.reset()
    loop_ema(separate, online)
    check_agreement("loop", separate, expected[len(w.online) :], 1e-6)
    cases["loop: t.data = tau t.data + (1 - tau) o.data"] = lambda: loop_ema(separate, online)
    capturable = ("torch._foreach_lerp_", "foreach mul+add")
    return Suite(cases, 12 * sum(t.numel() for t in w.target), baseline="torch._foreach_lerp_", capturable=capturable)


def loss_suite(device: str, batch: int, dtype: torch.dtype, num_local: int = 0) -> Suite:
    """Loss of all pairs of views with its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 256)] * 4 + [(num_local, batch, 256)] * (num_local > 0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    predictions = [x.requires_grad_() for x in (*inputs[:2], *inputs[4:])]
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        "byol_fast: byol_loss": byol_loss,
        "baseline": baseline_loss,
        "baseline, torch.compile": torch.compile(baseline_loss, dynamic=False),
    }
    if is_installed("lightly"):
        from lightly.loss import NegativeCosineSimilarity

        negative_cosine = NegativeCosineSimilarity()

        def by_lightly(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Sequence[Tensor] = ()) -> Tensor:
            pairs = [(p1, z2), (p2, z1), *((p, z) for p in p_local for z in (z1, z2))]
            loss: Tensor = 4 / len(pairs) * (len(pairs) + sum(negative_cosine(p, z) for p, z in pairs))
            return loss

        which = "every pair" if num_local else "both directions"
        losses[f"lightly: NegativeCosineSimilarity, {which}"] = by_lightly

    def gradients(loss: Loss) -> list[Tensor]:
        return list(torch.autograd.grad(loss(*inputs), predictions))

    expected = gradients(baseline_loss)
    for name, loss in losses.items():
        check_agreement(name, gradients(loss), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    repeats = max(1, 4096 // batch)

    def repeated(loss: Loss) -> Case:
        def call() -> None:
            for _ in range(repeats):
                gradients(loss)  # discarded at once, as a step frees them

        return call

    cases = {name: repeated(loss) for name, loss in losses.items()}
    return Suite(
        cases,
        (6 + 2 * num_local) * batch * 256 * dtype.itemsize,  # all inputs, and the gradients of the predictions
        repeats,
        baseline="baseline",
        uncounted=("baseline, torch.compile",),
        capturable=("baseline", "baseline, torch.compile"),
    )


def suites() -> dict[str, Callable[[str], Suite]]:
    """Name, and function that builds the suite on a device."""
    builders: dict[str, Callable[[str], Suite]] = {"LARS + EMA": optimizer_suite, "EMA": ema_suite}
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (64, 256, 1024, 4096):
            name = f"loss forward + backward, {batch} x 256 {str(dtype).removeprefix('torch.')}"
            builders[name] = functools.partial(loss_suite, batch=batch, dtype=dtype)
    name = f"loss with {NUM_LOCAL_VIEWS} local views forward + backward, 256 x 256 bfloat16"
    builders[name] = functools.partial(loss_suite, batch=256, dtype=torch.bfloat16, num_local=NUM_LOCAL_VIEWS)
    return builders
