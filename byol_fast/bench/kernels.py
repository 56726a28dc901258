"""Loss, moving average and LARS beside what people use today.

Correctness is checked before anything is timed. Sizes are those of ResNet-50 with the paper's heads: 35 M parameters in
169 tensors under LARS, 33 M in 164 under the moving average. Contenders of a suite work on the same memory, because
where tensors happen to lie is worth as much as many an optimisation. Peers come with `pip install byol_fast[peers]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.bench.counting import Case, Suite, agree, is_installed
from byol_fast.models.byol import BYOL
from byol_kernels import LARS, byol_loss, ema_update_

TAU, LR, DECAY, TRUST_COEFFICIENT, MOMENTUM = 0.99, 0.1, 1e-6, 1e-3, 0.9
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class LoopLARS(torch.optim.Optimizer):
    """LARS as it is often written: a loop over tensors, two norms brought to the host for each."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One step, the reference's rule."""
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
def loop_ema(target: list[Tensor], online: list[Tensor]) -> None:
    """The average as it is often written."""
    for t, o in zip(target, online, strict=True):
        t.data = t.data * TAU + o.data * (1 - TAU)


@torch.no_grad()
def foreach_ema(target: list[Tensor], online: list[Tensor]) -> None:
    """The average in two operators over lists."""
    torch._foreach_mul_(target, TAU)
    torch._foreach_add_(target, online, alpha=1 - TAU)


def textbook_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Both directions by `F.normalize`."""

    def one(p: Tensor, z: Tensor) -> Tensor:
        return 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1)

    return (one(p1, z2) + one(p2, z1)).mean()


class Weights:
    """A BYOL model's parameters with gradients, its target, and momentum for whoever needs it.

    Args:
        device: where they are.
        encoder: of the model, a torchvision model's name.
    """

    def __init__(self, device: str, encoder: str = "resnet50") -> None:
        torch.manual_seed(0)
        model = BYOL(encoder)
        self.online: list[nn.Parameter] = [nn.Parameter(p.detach().to(device)) for p in model.trainable_parameters()]
        for i, p in enumerate(self.online):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.grad = (noise * 1e-3).to(device)
        self.followed = self.online[: len(model.target_parameters())]
        self.target = [torch.zeros_like(p) for p in self.followed]
        self.momentum = [torch.zeros_like(p) for p in self.online]
        self._start = [p.detach().clone() for p in self.online]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: no momentum, and a target that is a little behind."""
        torch._foreach_copy_([*self.online], self._start)
        torch._foreach_zero_(self.momentum)
        torch._foreach_copy_(self.target, self._start[: len(self.target)])
        torch._foreach_mul_(self.target, 0.9)

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the momentum the state of an optimizer that calls it `momentum_buffer`."""
        for p, v in zip(self.online, self.momentum, strict=True):
            optimizer.state[p]["momentum_buffer"] = v

    def after(self, case: Case) -> list[Tensor]:
        """Weights and target after one call from the start."""
        self.reset()
        case()
        return [x.detach().clone() for x in (*self.online, *self.target)]

    def groups(self) -> list[dict[str, object]]:
        """As peers want to be told which tensors to leave out of decay and adaptation."""
        return [
            {"params": [p for p in self.online if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in self.online if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Online and target as modules."""
        target = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in self.target)
        return nn.ParameterList(self.followed), target


def timm_average(w: Weights) -> Case:
    """Timm's average of the parameters, in our memory."""
    from timm.utils.model_ema import ModelEmaV3

    online, target = w.modules()
    average = ModelEmaV3(online, decay=TAU, exclude_buffers=True)
    for mine, shared in zip(average.module.parameters(), target.parameters(), strict=True):
        mine.data = shared.data
    return lambda: average.update(online)


def optimizer_suite(device: str) -> Suite:
    """LARS and the average of the target, beside lightly's and timm's."""
    w = Weights(device)
    fused = LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST_COEFFICIENT)
    plain = LoopLARS(w.online)
    w.share(fused)
    w.share(plain)
    target_of = dict(zip(w.followed, w.target, strict=True))

    def restated() -> None:
        plain.step()
        foreach_ema(w.target, list(w.followed))

    low = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (*w.online, *w.target)}
    cases: dict[str, Case] = {
        "ours: LARS.step(ema=...)": lambda: fused.step(ema=(target_of, TAU)),
        "ours: LARS.step(ema=..., copies=...), bfloat16": lambda: fused.step(ema=(target_of, TAU), copies=low),
    }
    tolerances = {}
    if is_installed("lightly"):
        from lightly.models.utils import update_momentum
        from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

        lightly, (online, target) = LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM), w.modules()
        w.share(lightly)

        def run_lightly() -> None:
            lightly.step()
            update_momentum(online, target, TAU)

        cases["lightly: LARS, update_momentum"] = run_lightly
        # Its ratio is of |p| to |g| + decay |p| and not to |g + decay p|.
        tolerances["lightly: LARS, update_momentum"] = 1e-4
    if is_installed("timm"):
        from timm.optim.lars import Lars

        timm, average = Lars(w.groups(), lr=LR, momentum=MOMENTUM), timm_average(w)
        w.share(timm)

        def run_timm() -> None:
            timm.step()
            average()

        cases["timm: Lars, ModelEmaV3"] = run_timm
        tolerances["timm: Lars, ModelEmaV3"] = 1e-4
    cases["restated: LARS with .item(), foreach mul+add"] = restated

    ours, *others = cases
    expected = w.after(cases[ours])
    for other in others:
        agree(other, w.after(cases[other]), expected, tolerances.get(other, 1e-5))
    w.reset()
    moved = 20 * sum(p.numel() for p in w.online) + 8 * sum(p.numel() for p in w.followed)
    return Suite(cases, moved, baseline="restated: LARS with .item(), foreach mul+add")


def ema_suite(device: str) -> Suite:
    """The average alone."""
    w = Weights(device)
    online: list[Tensor] = list(w.followed)
    with torch.no_grad():
        apart = [t.clone() for t in w.target]  # the loop gives its targets new memory at each call
    cases: dict[str, Case] = {
        "ours: ema_update_": lambda: ema_update_(w.target, online, TAU),
        "torch._foreach_lerp_": torch.no_grad()(lambda: torch._foreach_lerp_(w.target, online, 1 - TAU)),
        "foreach mul+add": lambda: foreach_ema(w.target, online),
    }
    if is_installed("timm"):
        cases["timm: ModelEmaV3"] = timm_average(w)
    if is_installed("lightly"):
        from lightly.models.utils import update_momentum

        modules = w.modules()
        cases["lightly: update_momentum"] = lambda: update_momentum(*modules, TAU)
    ours, *others = cases
    expected = w.after(cases[ours])
    for other in others:
        agree(other, w.after(cases[other]), expected, 1e-6)
    w.reset()
    loop_ema(apart, online)
    agree("loop", apart, expected[len(w.online) :], 1e-6)
    cases["loop: t.data = tau t.data + (1 - tau) o.data"] = lambda: loop_ema(apart, online)
    own = ("torch._foreach_lerp_", "foreach mul+add")
    return Suite(cases, 12 * sum(t.numel() for t in w.target), baseline="torch._foreach_lerp_", capturable=own)


def loss_suite(device: str, batch: int, dtype: torch.dtype) -> Suite:
    """Loss of both directions and its gradients."""
    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(batch, 256, generator=generator).to(device, dtype) for _ in range(4))
    p1.requires_grad_()
    p2.requires_grad_()
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        "ours: byol_loss": byol_loss,
        "textbook": textbook_loss,
        "textbook, torch.compile": torch.compile(textbook_loss, dynamic=False),
    }
    if is_installed("lightly"):
        from lightly.loss import NegativeCosineSimilarity

        negative_cosine = NegativeCosineSimilarity()
        losses["lightly: NegativeCosineSimilarity, both directions"] = lambda p1, p2, z1, z2: (
            2 * (2 + negative_cosine(p1, z2) + negative_cosine(p2, z1))
        )

    def gradients(loss: Loss) -> list[Tensor]:
        return list(torch.autograd.grad(loss(p1, p2, z1, z2), [p1, p2]))

    expected = gradients(textbook_loss)
    for name, loss in losses.items():
        agree(name, gradients(loss), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    repeats = max(1, 4096 // batch)

    def repeated(loss: Loss) -> Case:
        def call() -> None:
            for _ in range(repeats):
                gradients(loss)  # and drop them: a step uses them and gives their memory back

        return call

    cases = {name: repeated(loss) for name, loss in losses.items()}
    return Suite(
        cases,
        6 * p1.numel() * p1.element_size(),
        repeats,
        baseline="textbook",
        uncounted=("textbook, torch.compile",),
        capturable=("textbook", "textbook, torch.compile"),
    )


def suites() -> dict[str, Callable[[str], Suite]]:
    """Name, and what makes the suite on a device."""
    found: dict[str, Callable[[str], Suite]] = {"LARS + EMA": optimizer_suite, "EMA": ema_suite}
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (64, 256, 1024, 4096):
            name = f"loss forward + backward, {batch} x 256 {str(dtype).removeprefix('torch.')}"
            found[name] = functools.partial(loss_suite, batch=batch, dtype=dtype)
    return found
