"""A training step on the CPU beside what people use: ResNet-18, 64 images of 64 px, both views made already.

    python -m benchmarks.step [--threads N] [--rounds N] [--suite peers|switches] [--only NAME ...] [--save FOLDER]

Needs the extra `peers` for the other packages; those that are not installed are left out, and named. Every contender is
a process of its own, so that nobody meets another's memory or settings, and takes one step a round in its turn. What is
timed is the process's CPU time (wall time is saved too). Before that, those that compute the same thing show that they
do: in float64 ours ends at the textbook's weights, and the packages' losses are the textbook's.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.bench import Table, Timing
from byol_fast.config import OptimConfig
from byol_fast.cpu import keep_freed_memory, use_small_map_convolutions
from byol_fast.data import Batch
from byol_fast.files import atomic_path
from byol_fast.methods import BYOL
from byol_fast.optim import make_optimizer
from byol_fast.precision import Precision
from byol_fast.schedules import RunSchedule
from byol_fast.step import TrainStep

BATCH, SIZE, HIDDEN, OUT, TAU, LR, MOMENTUM = 64, 64, 4096, 256, 0.99, 0.05, 0.9
WARMUP = 2
Step = Callable[[], Tensor]
"""Takes one training step and returns its loss."""


# ------------------------------------------------------------------------------------------------ the same problem


def seeded_encoder() -> nn.Module:
    from torchvision.models import resnet18

    encoder: nn.Module = resnet18()
    encoder.fc = nn.Identity()
    return encoder


def head(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, OUT)
    )


def weights() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, projector and predictor that all contenders begin with."""
    torch.manual_seed(0)
    return seeded_encoder(), head(512), head(OUT)


def take(module: nn.Module, source: nn.Module, without: str | None = None) -> None:
    """Copy parameters in order: names differ from package to package, the order of layers does not.

    Args:
        module: where to.
        source: where from.
        without: a parameter of the source that the module does not have.
    """
    theirs = [p for name, p in source.named_parameters() if name != without]
    with torch.no_grad():
        for p, q in zip(module.parameters(), theirs, strict=True):
            p.copy_(q)


def views(batch: int = BATCH, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    view1, view2 = torch.randn(2, batch, 3, size, size, generator=generator)
    return view1, view2


# ------------------------------------------------------------------------------------------------ contenders


class Textbook:
    """The loop that guides print: four passes, normalised products, torch's optimizer, the average in a loop.

    Args:
        dtype: of the weights.
        optimizer: "sgd" with momentum, or "adam" as the guide has it.
        channels_last: NHWC memory.
        bf16: under autocast.
        concat: both views in one pass, so that batch norm mixes them (byol-pytorch's semantics).
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "sgd",
        channels_last: bool = False,
        bf16: bool = False,
        concat: bool = False,
    ) -> None:
        encoder, projector, self.predictor = (m.to(dtype) for m in weights())
        self.online = nn.Sequential(encoder, projector)
        encoder, projector, _ = (m.to(dtype) for m in weights())
        self.target = nn.Sequential(encoder, projector).requires_grad_(False)
        self.views = tuple(v.to(dtype) for v in views())
        if channels_last:
            for network in (self.online, self.target):
                network.to(memory_format=torch.channels_last)
            self.views = tuple(v.contiguous(memory_format=torch.channels_last) for v in self.views)
        parameters = [*self.online.parameters(), *self.predictor.parameters()]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
            if optimizer == "sgd"
            else torch.optim.Adam(parameters, lr=1e-3)
        )
        self.bf16, self.concat = bf16, concat

    def passes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.concat:
            both = torch.cat(self.views)
            with torch.no_grad():
                z1, z2 = self.target(both).chunk(2)
            p1, p2 = self.predictor(self.online(both)).chunk(2)
        else:
            view1, view2 = self.views
            with torch.no_grad():
                z1, z2 = self.target(view1), self.target(view2)
            p1, p2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        return p1, p2, z1, z2

    def __call__(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            p1, p2, z1, z2 = self.passes()
        loss = self.regression(p1, z2) + self.regression(p2, z1)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
                target.data = TAU * target.data + (1 - TAU) * online.data
        return loss.detach()

    @staticmethod
    def regression(p: Tensor, z: Tensor) -> Tensor:
        p, z = (t if t.dtype == torch.float64 else t.float() for t in (p, z))
        return (2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1)).mean()


class Ours:
    """byol_fast's step as its trainer runs it on a CPU.

    Args:
        dtype: of the weights.
        optimizer: "lars", or "sgd" to compare weights with the textbook's.
        bf16: under autocast, with the weight copies of the fused optimizer.
        batched: both views in one pass, exactly.
        small_maps: `use_small_map_convolutions`.
        memory: `keep_freed_memory`, for the whole process.
        channels_last: NHWC memory.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "lars",
        bf16: bool = False,
        batched: bool = True,
        small_maps: bool = True,
        memory: bool = True,
        channels_last: bool = True,
    ) -> None:
        encoder, projector, predictor = weights()
        self.task = BYOL(
            encoder,
            hidden_dim=HIDDEN,
            projection_dim=OUT,
            last_bias=True,
            image_size=SIZE,
            views="batched" if batched else "separate",
        )
        for network, heads in ((self.task.online, (projector, predictor)), (self.task.target, (projector,))):
            for mine, theirs in zip((network.projector, getattr(network, "predictor", None)), heads, strict=False):
                assert isinstance(mine, nn.Module)
                take(mine, theirs)
        self.task.to(dtype)
        if channels_last:
            self.task.to(memory_format=torch.channels_last)
        if small_maps:
            use_small_map_convolutions(self.task)
        if memory:
            keep_freed_memory()
        config = OptimConfig(name=optimizer, momentum=MOMENTUM, weight_decay=0.0 if optimizer == "sgd" else 1e-6)  # type: ignore[arg-type]
        schedule = RunSchedule(
            total_steps=10**6,
            warmup_steps=0,
            base_lr=LR,
            batch_size=256,
            lr_schedule="constant",
            tau_base=TAU,
            tau_schedule="constant",
        )
        self.step = TrainStep(
            self.task,
            make_optimizer(config, self.task.trainable_parameters()),
            schedule,
            precision=Precision("bf16", torch.bfloat16) if bf16 else Precision("fp32", None),
            channels_last=channels_last,
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        view1, view2 = (v.to(dtype).contiguous(memory_format=layout) for v in views())  # the loader's layout
        self.batch = Batch(view1, view2, torch.arange(BATCH))

    def __call__(self) -> Tensor:
        return self.step(self.batch, 0).loss


class Lightly:
    """lightly's building blocks put together as in its example `byol.py`, with its LARS."""

    def __init__(self) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.utils.lars import LARS

        encoder, projector, predictor = weights()
        self.backbone, self.projector = encoder, BYOLProjectionHead(512, HIDDEN, OUT)
        self.predictor = BYOLPredictionHead(OUT, HIDDEN, OUT)
        # Its first layer has no bias: batch norm takes it out again.
        take(self.projector, projector, without="0.bias")
        take(self.predictor, predictor, without="0.bias")
        self.momentum_backbone = seeded_encoder()
        self.momentum_projector = BYOLProjectionHead(512, HIDDEN, OUT)
        take(self.momentum_backbone, encoder)
        take(self.momentum_projector, projector, without="0.bias")
        for network in (self.momentum_backbone, self.momentum_projector):
            deactivate_requires_grad(network)
        parameters = [p for m in (self.backbone, self.projector, self.predictor) for p in m.parameters()]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6)
        self.criterion, self.update_momentum = NegativeCosineSimilarity(), update_momentum
        self.views = views()

    def __call__(self) -> Tensor:
        self.update_momentum(self.backbone, self.momentum_backbone, TAU)
        self.update_momentum(self.projector, self.momentum_projector, TAU)
        view1, view2 = self.views
        p1, p2 = (self.predictor(self.projector(self.backbone(v).flatten(start_dim=1))) for v in (view1, view2))
        z1, z2 = (self.momentum_projector(self.momentum_backbone(v).flatten(start_dim=1)) for v in (view1, view2))
        loss: Tensor = 0.5 * (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class BYOLPyTorch:
    """byol-pytorch's learner as in its README, with two given views in place of its augmentations."""

    def __init__(self) -> None:
        from byol_pytorch import BYOL as Learner  # noqa: N811

        encoder, projector, predictor = weights()
        self.views = list(views())
        self.learner = Learner(
            encoder,
            image_size=SIZE,
            hidden_layer=-1,
            projection_size=OUT,
            projection_hidden_size=HIDDEN,
            augment_fn=lambda _: self.views[0],
            augment_fn2=lambda _: self.views[1],
            moving_average_decay=TAU,
            use_simplicial_embeddings=False,
        )
        take(self.learner.online_encoder.projector, projector)
        take(self.learner.target_encoder.projector, projector)
        take(self.learner.online_predictor, predictor)
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    def __call__(self) -> Tensor:
        loss: Tensor = self.learner(self.views[0])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.learner.update_moving_average()
        return loss.detach()


class StablePretraining:
    """stable-pretraining's BYOL module in a plain loop, with its LARS and what its callback does after a step."""

    def __init__(self) -> None:
        from stable_pretraining.methods.byol import BYOL as Module  # noqa: N811
        from stable_pretraining.optim import LARS

        encoder, projector, predictor = weights()
        self.module = Module(encoder, (HIDDEN, OUT), (HIDDEN, OUT), ema_decay_start=TAU, ema_decay_end=TAU)
        take(self.module.projector.student, projector)
        take(self.module.projector.teacher, projector)
        take(self.module.predictor, predictor)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6, exclude_bias_n_norm=True)
        self.views = views()

    def __call__(self) -> Tensor:
        loss: Tensor = self.module(*self.views).loss
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.module.backbone.update_teacher()
        self.module.projector.update_teacher()
        return loss.detach()


@dataclass(frozen=True, slots=True)
class Contender:
    """Who, and what it does differently."""

    make: Callable[[], Step]
    note: str
    needs: str = ""
    """Distribution that must be installed."""

    @property
    def version(self) -> str:
        """Of that distribution."""
        return importlib.metadata.version(self.needs) if self.needs else ""


ALONE = "four passes, a view at a time"
BOTH = "two passes, both views in each, statistics for each view"
TEXTBOOK = "textbook: fp32, NCHW"
PEERS: dict[str, Contender] = {
    TEXTBOOK: Contender(Textbook, f"{ALONE}; loss by F.normalize; SGD; average in a loop at the end"),
    "textbook with Adam": Contender(lambda: Textbook(optimizer="adam"), "as the textbook; Adam, as the guide has it"),
    "lightly": Contender(
        Lightly,
        f"{ALONE}; loss times 1/4 minus 1, by cosine_similarity; its LARS, which decays and adapts biases and norms "
        "too; foreach average at the beginning; targets of frozen parameters, detached",
        needs="lightly",
    ),
    "byol-pytorch": Contender(
        BYOLPyTorch,
        "two passes, both views in each, batch norm mixes them: another function; it has no optimizer: the textbook's "
        "SGD; average in a loop at the end; its simplicial embeddings off",
        needs="byol-pytorch",
    ),
    "stable-pretraining": Contender(
        StablePretraining,
        f"{ALONE}; loss times 1/2; its LARS; average of parameters and buffers in a loop at the end; its Lightning "
        "trainer left out",
        needs="stable-pretraining",
    ),
    "ours, fp32": Contender(Ours, f"{BOTH}; NHWC; LARS and average in one pass; undoes steps that are not finite"),
    "ours, bf16": Contender(lambda: Ours(bf16=True), "as ours; bf16 autocast, weights cast by the optimizer"),
}
SWITCHES: dict[str, Contender] = {
    TEXTBOOK: PEERS[TEXTBOOK],
    "textbook, NHWC": Contender(lambda: Textbook(channels_last=True), "as the textbook"),
    "textbook, NHWC, bf16": Contender(lambda: Textbook(channels_last=True, bf16=True), "as the textbook, autocast"),
    "ours, views separate": Contender(
        lambda: Ours(batched=False, memory=False, small_maps=False), "NHWC; LARS and average in one pass"
    ),
    "+ views batched": Contender(lambda: Ours(memory=False, small_maps=False), "both views in each of two passes"),
    "+ freed memory kept": Contender(lambda: Ours(small_maps=False), "keep_freed_memory"),
    "+ small maps: ours, fp32": Contender(Ours, "use_small_map_convolutions"),
    "ours, bf16, none of the last three": Contender(
        lambda: Ours(bf16=True, batched=False, memory=False, small_maps=False), "views separate"
    ),
    "ours, bf16": Contender(lambda: Ours(bf16=True), "all"),
}
SUITES = {"peers": PEERS, "switches": SWITCHES}


# ------------------------------------------------------------------------------------------------ correctness


def check() -> None:
    """Raise unless those who should compute the same thing do."""
    plain, ours = Textbook(dtype=torch.float64), Ours(dtype=torch.float64, optimizer="sgd")
    for _ in range(2):
        agree("ours, float64", ours(), plain(), 1e-11)
    pairs = [
        ("online weights", ours.task.online.parameters(), [*plain.online.parameters(), *plain.predictor.parameters()]),
        ("target weights", ours.task.target.parameters(), plain.target.parameters()),
        ("online statistics", ours.task.online.buffers(), [*plain.online.buffers(), *plain.predictor.buffers()]),
        ("target statistics", ours.task.target.buffers(), plain.target.buffers()),
    ]
    for what, found, expected in pairs:
        worst = max(difference(a, b) for a, b in zip(found, expected, strict=True))
        print(f"  ours and the textbook after 2 steps in float64, {what}: largest relative difference {worst:.1e}")
        if not worst < 1e-9:
            raise AssertionError(f"{what} differ")
    del plain, ours
    expected, mixed = Textbook()(), Textbook(concat=True)()
    agree("ours, fp32", Ours()(), expected, 1e-4)
    agree("ours, bf16", Ours(bf16=True)(), expected, 2e-2)
    for name, factor, constant in (("lightly", 4, 4), ("stable-pretraining", 2, 0)):
        if installed(PEERS[name]):
            agree(name, factor * PEERS[name].make()() + constant, expected, 1e-4)
    if installed(PEERS["byol-pytorch"]):
        agree("byol-pytorch (a textbook that mixes views)", PEERS["byol-pytorch"].make()(), mixed, 1e-4)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-12))


def agree(what: str, found: Tensor, expected: Tensor, bound: float) -> None:
    off = difference(found, expected)
    print(f"  loss of {what}: {float(found):.6f}, textbook {float(expected):.6f}")
    if not off <= bound:
        raise AssertionError(f"{what}: relative difference {off:.1e}, allowed {bound:.0e}")


def installed(contender: Contender) -> bool:
    return not contender.needs or importlib.util.find_spec(contender.needs.replace("-", "_")) is not None


# ------------------------------------------------------------------------------------------------ timing


def serve(pipe: Connection, suite: str, name: str, threads: int) -> None:
    """A contender's process: take a step whenever told to, say what it cost; in the end the most memory it used."""
    torch.set_num_threads(threads)
    step = SUITES[suite][name].make()
    pipe.send(None)
    while pipe.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall))
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had used before
    pipe.send(int(status.split("VmHWM:")[1].split()[0]) / 2**20)


@dataclass(slots=True)
class Measured:
    """What a contender's steps cost."""

    cpu: list[float]
    wall: list[float]
    peak_gib: float = 0.0


def measure(suite: str, names: list[str], rounds: int, threads: int) -> Iterator[tuple[str, Measured]]:
    """Interleaved steps of all contenders, one at a time."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, suite, name, threads), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    results = {name: Measured([], []) for name in names}
    for number in range(WARMUP + rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            cpu, wall = pipe.recv()
            if number >= WARMUP:
                results[name].cpu.append(cpu)
                results[name].wall.append(wall)
    for (name, pipe), process in zip(pipes.items(), processes, strict=True):
        pipe.send(False)
        results[name].peak_gib = pipe.recv()
        process.join()
        yield name, results[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--suite", choices=list(SUITES), nargs="+", default=list(SUITES))
    parser.add_argument("--only", nargs="+", help="these of the suite, beside the textbook")
    parser.add_argument("--save", type=Path, help="folder for step.csv, notes.csv and environment.json")
    arguments = parser.parse_args()
    print("Correctness", flush=True)
    checking = multiprocessing.get_context("spawn").Process(target=check)
    checking.start()
    checking.join()
    if checking.exitcode:
        raise SystemExit("step: contenders disagree, nothing is timed")
    print(f"{arguments.threads} threads, {arguments.rounds} interleaved rounds, load {os.getloadavg()[0]:.1f}")
    table, notes = Table(over="the textbook"), []
    for suite in arguments.suite:
        asked = {name: c for name, c in SUITES[suite].items() if name in {TEXTBOOK, *(arguments.only or SUITES[suite])}}
        contenders = {name: c for name, c in asked.items() if installed(c)}
        for name in asked.keys() - contenders.keys():
            print(f"  {name}: not installed, left out")
        results = dict(measure(suite, list(contenders), arguments.rounds, arguments.threads))
        table.add(f"{suite}, CPU time", {name: Timing(tuple(m.cpu)) for name, m in results.items()})
        table.add(f"{suite}, wall time", {name: Timing(tuple(m.wall)) for name, m in results.items()})
        notes += [[suite, name, f"{results[name].peak_gib:.2f}", c.version, c.note] for name, c in contenders.items()]
    for suite, name, peak, version, note in notes:
        print(f"  {suite}: {name} {version}: peak {peak} GiB; {note}")
    if arguments.save:
        table.save(arguments.save, "step", torch.device("cpu"))
        with atomic_path(arguments.save / "notes.csv") as path, path.open("w", newline="") as file:
            csv.writer(file).writerows([["suite", "provider", "peak GiB", "version", "what it does"], *notes])


if __name__ == "__main__":
    main()
