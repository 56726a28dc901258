"""Loss, moving average and LARS beside what people use today.

    python -m benchmarks.kernels [--rounds N] [--save FOLDER]

On the CPU. Correctness is checked before anything is timed. Sizes are those of ResNet-50 with the paper's heads:
35 M parameters in 169 tensors under LARS, 33 M in 164 under the moving average.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.bench import Table, Timing, interleaved
from byol_fast.methods import BYOL
from byol_kernels import LARS, byol_loss, ema_update_

TAU, LR, DECAY, ETA, MOMENTUM = 0.99, 0.1, 1e-6, 1e-3, 0.9


class LoopLARS(torch.optim.Optimizer):
    """LARS as lightly and solo-learn write it: a loop over tensors, two norms brought to the host for each."""

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
                        update = update.mul(ETA * weight_norm / update_norm)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(MOMENTUM).add_(update)
                p.add_(state["momentum_buffer"], alpha=-LR)


@torch.no_grad()
def loop_ema(target: list[Tensor], online: list[Tensor]) -> None:
    for t, o in zip(target, online, strict=True):
        t.data = t.data * TAU + o.data * (1 - TAU)


@torch.no_grad()
def foreach_ema(target: list[Tensor], online: list[Tensor]) -> None:
    torch._foreach_mul_(target, TAU)
    torch._foreach_add_(target, online, alpha=1 - TAU)


def textbook_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    def one(p: Tensor, z: Tensor) -> Tensor:
        return 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1)

    return (one(p1, z2) + one(p2, z1)).mean()


class Weights:
    """A ResNet-50 BYOL model's parameters with gradients, the same for every contender."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = BYOL("resnet50")
        self.online = model.trainable_parameters()
        self.target: list[Tensor] = list(model.target_parameters())
        for p in self.online:
            p.grad = torch.randn_like(p) * 1e-3

    @property
    def followed(self) -> list[Tensor]:
        return list(self.online[: len(self.target)])


def agree(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        x, y = x.detach(), y.detach()  # noqa: PLW2901
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-12))
        if not error <= tolerance:
            raise AssertionError(f"contenders disagree: relative error {error:.2e}, allowed {tolerance:.0e}")


def optimizer_suite(rounds: int) -> dict[str, Timing]:
    ours, loop, foreach = Weights(), Weights(), Weights()
    fused = LARS(ours.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, eta=ETA)
    plain, plain_foreach = LoopLARS(loop.online), LoopLARS(foreach.online)
    target_of = dict(zip(ours.followed, ours.target, strict=True))

    def run_loop() -> None:
        plain.step()
        loop_ema(loop.target, loop.followed)

    def run_foreach() -> None:
        plain_foreach.step()
        foreach_ema(foreach.target, foreach.followed)

    cases: dict[str, Callable[[], object]] = {
        "ours: LARS.step(ema=...)": lambda: fused.step(ema=(target_of, TAU)),
        "per-tensor LARS with .item(), EMA loop": run_loop,
        "per-tensor LARS with .item(), foreach mul+add EMA": run_foreach,
    }
    for call in cases.values():
        call()
    agree([*ours.online, *ours.target], [*loop.online, *loop.target], 1e-5)
    return interleaved(cases, rounds=rounds)


def ema_suite(rounds: int) -> dict[str, Timing]:
    weights = {name: Weights() for name in ("ours: ema_update_", "torch._foreach_lerp_", "foreach mul+add", "loop")}
    online = {name: w.followed for name, w in weights.items()}
    target = {name: w.target for name, w in weights.items()}
    a, b, c, d = weights
    cases: dict[str, Callable[[], object]] = {
        a: lambda: ema_update_(target[a], online[a], TAU),
        b: lambda: torch._foreach_lerp_(target[b], online[b], 1 - TAU),
        c: lambda: foreach_ema(target[c], online[c]),
        d: lambda: loop_ema(target[d], online[d]),
    }
    for values in online.values():
        with torch.no_grad():
            for i, p in enumerate(values):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    with torch.no_grad():
        for call in cases.values():
            call()
        agree(target[a], target[b], 1e-6)
        agree(target[a], target[c], 1e-6)
        return interleaved(cases, rounds=rounds)


def loss_suite(rounds: int, batch: int, dtype: torch.dtype) -> dict[str, Timing]:
    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(batch, 256, generator=generator).to(dtype) for _ in range(4))
    p1.requires_grad_()
    p2.requires_grad_()

    def run(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(p1, p2, z1, z2), [p1, p2])

    bound = 1e-5 if dtype == torch.float32 else 2e-2
    agree(list(run(byol_loss)), list(run(textbook_loss)), bound)
    repeats = max(1, 4096 // batch)

    def repeated(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: [run(loss) for _ in range(repeats)]

    times = interleaved({"ours: byol_loss": repeated(byol_loss), "textbook": repeated(textbook_loss)}, rounds=rounds)
    return {name: Timing(tuple(s / repeats for s in t.seconds)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--save", type=Path, help="folder for kernels.csv and environment.json")
    arguments = parser.parse_args()
    suites: dict[str, Callable[[], dict[str, Timing]]] = {
        "LARS + EMA": lambda: optimizer_suite(arguments.rounds),
        "EMA": lambda: ema_suite(arguments.rounds),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (64, 256, 1024, 4096):
            name = f"loss forward + backward, {batch} x 256 {str(dtype).removeprefix('torch.')}"
            suites[name] = lambda batch=batch, dtype=dtype: loss_suite(arguments.rounds, batch, dtype)  # type: ignore[misc]
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} interleaved rounds")
    table = Table()
    for suite, run in suites.items():
        table.add(suite, run())
    if arguments.save:
        table.save(arguments.save, "kernels", torch.device("cpu"))


if __name__ == "__main__":
    main()
