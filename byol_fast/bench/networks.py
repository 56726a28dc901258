"""Training steps: ours, the loop that guides print, and other packages', all on the same problem.

Both views are made already, on the device. Every contender begins with the same weights. Those of other packages are
put together as their documentation does; what each does differently stands in its note.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.bench.flags import EXACT, BackendFlags
from byol_fast.bench.processes import Job
from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.byol import BYOL
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.mode import Mode, compile_forward
from byol_fast.training.train_step import TrainStep
from byol_fast.utils import env
from byol_fast.utils.cpu_tuning import keep_freed_memory, use_small_map_convolutions
from byol_fast.utils.precision import Precision

TAU, LR, MOMENTUM = 0.99, 0.05, 0.9
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every contender has to do."""

    encoder: str = "resnet18"
    cifar_stem: bool = False
    image_size: int = 64
    batch_size: int = 64
    """Images, so twice as many views."""
    hidden_dim: int = 4096
    projection_dim: int = 256
    device: str = "cpu"
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and take the fastest, for every candidate."""

    def new_encoder(self) -> nn.Module:
        """The encoder, with weights that only depend on torch's seed."""
        return build_encoder(self.encoder, image_size=self.image_size, cifar_stem=self.cifar_stem)

    def head(self, inputs: int) -> nn.Module:
        """A projector or predictor."""
        return nn.Sequential(
            nn.Linear(inputs, self.hidden_dim),
            nn.BatchNorm1d(self.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden_dim, self.projection_dim),
        )

    @functools.cached_property
    def features(self) -> int:
        """Size of the encoder's features."""
        return feature_dim(self.new_encoder(), self.image_size)

    def weights(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Encoder, projector and predictor that all contenders begin with."""
        torch.manual_seed(0)
        encoder = self.new_encoder()
        projector = self.head(feature_dim(encoder, self.image_size))
        predictor = self.head(self.projection_dim)
        return encoder, projector, predictor

    def views(self) -> tuple[Tensor, Tensor]:
        """Two normalised views `[B, 3, S, S]`, fp32, on the device."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.batch_size, 3, self.image_size, self.image_size)
        view1, view2 = torch.randn(shape, generator=generator).to(self.device)
        return view1, view2


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


# ------------------------------------------------------------------------------------------------ contenders


class Textbook:
    """The loop that guides print: four passes, normalised products, torch's optimizer, the average in a loop.

    Args:
        problem: what to do.
        dtype: of the weights.
        optimizer: "sgd" with momentum, or "adam" as the guide has it.
        channels_last: NHWC memory.
        precision: "fp32", or what autocast computes with.
        concat: both views in one pass, so that batch norm mixes them (byol-pytorch's semantics).
        compile_forward: networks and loss by torch.compile.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "sgd",
        channels_last: bool = False,
        precision: str = "fp32",
        concat: bool = False,
        compile_forward: bool = False,
    ) -> None:
        encoder, projector, self.predictor = (m.to(problem.device, dtype) for m in problem.weights())
        self.online = nn.Sequential(encoder, nn.Flatten(), projector)
        encoder, projector, _ = (m.to(problem.device, dtype) for m in problem.weights())
        self.target = nn.Sequential(encoder, nn.Flatten(), projector).requires_grad_(False)
        self.views = tuple(v.to(dtype) for v in problem.views())
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
        self.device_type, self.autocast, self.concat = torch.device(problem.device).type, DTYPES[precision], concat
        self.forward: Callable[[], Tensor] = torch.compile(self.loss, dynamic=False) if compile_forward else self.loss

    def loss(self) -> Tensor:
        """Of both directions."""
        with torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None):
            p1, p2, z1, z2 = self.passes()
        return self.regression(p1, z2) + self.regression(p2, z1)

    def passes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions and targets of both views."""
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
        """Take one training step; its loss."""
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
                target.data = TAU * target.data + (1 - TAU) * online.data
        return loss.detach()

    @staticmethod
    def regression(p: Tensor, z: Tensor) -> Tensor:
        """Mean of 2 - 2 cos."""
        p, z = (t if t.dtype == torch.float64 else t.float() for t in (p, z))
        return (2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1)).mean()


class Ours:
    """byol_fast's step as its trainer runs it, but for process-wide flags: `make` sets those of a comparison.

    Args:
        problem: what to do.
        dtype: of the weights.
        optimizer: "lars", or "sgd" to compare weights with the textbook's.
        precision: "fp32", "tf32", "bf16" or "fp16".
        mode: "eager", "compile" or "graph".
        batched: both views in one pass, exactly.
        small_maps: `use_small_map_convolutions`, on CPUs.
        memory: `keep_freed_memory`, on CPUs, for the whole process.
        channels_last: NHWC memory.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "lars",
        precision: str = "fp32",
        mode: str = "eager",
        batched: bool = True,
        small_maps: bool = True,
        memory: bool = True,
        channels_last: bool = True,
    ) -> None:
        arithmetic = Precision(precision, DTYPES[precision])  # type: ignore[arg-type]
        device = torch.device(problem.device)
        self.model = our_model(problem, "batched" if batched else "separate").to(device, dtype)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if device.type == "cpu" and small_maps and mode == "eager":
            use_small_map_convolutions(self.model)
        if device.type == "cpu" and memory:
            keep_freed_memory()
        config = OptimConfig(name=optimizer, momentum=MOMENTUM, weight_decay=0.0 if optimizer == "sgd" else 1e-6)  # type: ignore[arg-type]
        how = Mode(mode, "as asked")  # type: ignore[arg-type]
        self.step = TrainStep(
            self.model,
            build_optimizer(config, self.model.trainable_parameters()),
            constant_rates(),
            precision=arithmetic,
            forward=compile_forward(self.model, how),
            channels_last=channels_last,
        )
        if mode == "graph":
            self.step.use_cuda_graph()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        view1, view2 = (v.to(dtype).contiguous(memory_format=layout) for v in problem.views())  # the loader's layout
        self.batch = Batch((view1, view2), None, torch.arange(problem.batch_size))

    def __call__(self) -> Tensor:
        """Take one training step; its loss."""
        return self.step(self.batch, 0).loss


def our_model(problem: Problem, views: str) -> BYOL:
    """Our model with the weights that all begin with."""
    encoder, projector, predictor = problem.weights()
    model = BYOL(
        encoder,
        hidden_dim=problem.hidden_dim,
        projection_dim=problem.projection_dim,
        last_bias=True,
        image_size=problem.image_size,
        views=views,  # type: ignore[arg-type]
    )
    for network, heads in ((model.online, (projector, predictor)), (model.target, (projector,))):
        for mine, theirs in zip((network.projector, getattr(network, "predictor", None)), heads, strict=False):
            assert isinstance(mine, nn.Module)
            take(mine, theirs)
    return model


def constant_rates() -> RunSchedule:
    """Learning rate and tau that do not change."""
    return RunSchedule(
        total_steps=10**6,
        warmup_steps=0,
        base_lr=LR,
        batch_size=256,
        lr_schedule="constant",
        tau_base=TAU,
        tau_schedule="constant",
    )


class Lightly:
    """lightly's building blocks put together as in its example `byol.py`, with its LARS."""

    def __init__(self, problem: Problem) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.utils.lars import LARS

        encoder, projector, predictor = problem.weights()
        hidden, out = problem.hidden_dim, problem.projection_dim
        self.backbone, self.projector = encoder, BYOLProjectionHead(problem.features, hidden, out)
        self.predictor = BYOLPredictionHead(out, hidden, out)
        # Its first layer has no bias: batch norm takes it out again.
        take(self.projector, projector, without="0.bias")
        take(self.predictor, predictor, without="0.bias")
        self.momentum_backbone = problem.new_encoder()
        self.momentum_projector = BYOLProjectionHead(problem.features, hidden, out)
        take(self.momentum_backbone, encoder)
        take(self.momentum_projector, projector, without="0.bias")
        for network in (self.momentum_backbone, self.momentum_projector):
            deactivate_requires_grad(network)
        for network in (self.backbone, self.projector, self.predictor, self.momentum_backbone, self.momentum_projector):
            network.to(problem.device)
        parameters = [p for m in (self.backbone, self.projector, self.predictor) for p in m.parameters()]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6)
        self.criterion, self.update_momentum = NegativeCosineSimilarity(), update_momentum
        self.views = problem.views()

    def __call__(self) -> Tensor:
        """Take one training step; its loss."""
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

    def __init__(self, problem: Problem) -> None:
        from byol_pytorch import BYOL as Learner  # noqa: N811

        encoder, projector, predictor = problem.weights()
        self.views = list(problem.views())
        self.learner = Learner(
            encoder.to(problem.device),
            image_size=problem.image_size,
            hidden_layer=-1,
            projection_size=problem.projection_dim,
            projection_hidden_size=problem.hidden_dim,
            augment_fn=lambda _: self.views[0],
            augment_fn2=lambda _: self.views[1],
            moving_average_decay=TAU,
            use_simplicial_embeddings=False,
        )
        take(self.learner.online_encoder.projector, projector)
        take(self.learner.target_encoder.projector, projector)
        take(self.learner.online_predictor, predictor)
        self.learner.to(problem.device)
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    def __call__(self) -> Tensor:
        """Take one training step; its loss."""
        loss: Tensor = self.learner(self.views[0])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.learner.update_moving_average()
        return loss.detach()


class StablePretraining:
    """stable-pretraining's BYOL module in a plain loop, with its LARS and what its callback does after a step."""

    def __init__(self, problem: Problem) -> None:
        import loguru

        loguru.logger.disable("stable_pretraining")  # it tells of Lightning's needs, which a plain loop has not
        from stable_pretraining.methods.byol import BYOL as Module  # noqa: N811
        from stable_pretraining.optim import LARS

        encoder, projector, predictor = problem.weights()
        heads = (problem.hidden_dim, problem.projection_dim)
        self.module = Module(encoder, heads, heads, ema_decay_start=TAU, ema_decay_end=TAU)
        take(self.module.projector.student, projector)
        take(self.module.projector.teacher, projector)
        take(self.module.predictor, predictor)
        self.module.to(problem.device)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6, exclude_bias_n_norm=True)
        self.views = problem.views()

    def __call__(self) -> Tensor:
        """Take one training step; its loss."""
        loss: Tensor = self.module(*self.views).loss
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.module.backbone.update_teacher()
        self.module.projector.update_teacher()
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who, and what it does differently."""

    kind: str
    """A class of this module."""
    note: str
    options: dict[str, Any]
    needs: str = ""
    """Distribution that must be installed."""

    @property
    def version(self) -> str:
        """Of that distribution; nothing where it is missing or none is needed."""
        return (env.version(self.needs) or "") if self.needs else ""

    @property
    def is_installed(self) -> bool:
        """Whether it can be made here."""
        return bool(self.version or not self.needs)

    def job(self, problem: Problem) -> Job:
        """As a process needs it."""
        return Job(maker=f"{__name__}:make", arguments={"kind": self.kind, "problem": problem, "options": self.options})


def make(kind: str, problem: Problem, options: dict[str, Any]) -> Any:
    """A contender by the name of its class, under the process-wide flags of its precision.

    This is the only place where a comparison sets flags, so they are the same for all contenders of a precision.
    """
    precision = options.get("precision", "fp32")
    BackendFlags.of(precision, cudnn_benchmark=problem.cudnn_benchmark).apply()
    return _build(kind, problem, options)


def _build(kind: str, problem: Problem, options: dict[str, Any]) -> Any:
    return globals()[kind](problem, **options)


ALONE = "four passes, a view at a time"
BOTH = "two passes, both views in each, statistics for each view"
TEXTBOOK = "textbook: fp32, NCHW"


def textbook(note: str = "as the textbook", **options: Any) -> Contender:
    """The printed loop, with changes."""
    return Contender(kind="Textbook", note=note, options=options)


def ours(note: str = "as ours", **options: Any) -> Contender:
    """Our step."""
    return Contender(kind="Ours", note=note, options=options)


def peers(device: torch.device) -> dict[str, Contender]:
    """Other packages and ours, on a device."""
    mode = "graph" if device.type == "cuda" else "eager"
    how = "one CUDA graph; " if mode == "graph" else ""
    return {
        TEXTBOOK: textbook(f"{ALONE}; loss by F.normalize; SGD; average in a loop at the end"),
        "textbook with Adam": textbook("as the textbook; Adam, as the guide has it", optimizer="adam"),
        "textbook, NHWC, bf16": textbook("as the textbook, autocast", channels_last=True, precision="bf16"),
        "lightly": Contender(
            kind="Lightly",
            note=f"{ALONE}; fp32; loss times 1/4 minus 1, by cosine_similarity; its LARS, which decays and adapts "
            "biases and norms too; foreach average at the beginning; targets of frozen parameters, detached",
            options={},
            needs="lightly",
        ),
        "byol-pytorch": Contender(
            kind="BYOLPyTorch",
            note="two passes, both views in each, batch norm mixes them: another function; fp32; it has no optimizer: "
            "the textbook's SGD; average in a loop at the end; its simplicial embeddings off",
            options={},
            needs="byol-pytorch",
        ),
        "stable-pretraining": Contender(
            kind="StablePretraining",
            note=f"{ALONE}; fp32; loss times 1/2; its LARS; average of parameters and buffers in a loop at the end; "
            "its Lightning trainer left out",
            options={},
            needs="stable-pretraining",
        ),
        "ours, fp32": ours(
            f"{how}{BOTH}; NHWC; LARS and average in one pass; undoes steps that are not finite",
            mode=mode,
        ),
        "ours, bf16": ours("as ours; autocast, weights cast by the optimizer", precision="bf16", mode=mode),
    }


def switches(device: torch.device, precision: str, modes: tuple[str, ...]) -> dict[str, Contender]:
    """From the textbook to ours, one change at a time.

    Args:
        device: where to.
        precision: of the run that is asked about.
        modes: of execution, of it.
    """
    found = {
        TEXTBOOK: textbook(f"{ALONE}; loss by F.normalize; SGD; average in a loop at the end"),
        "textbook, NHWC": textbook(channels_last=True),
    }
    if precision != "fp32":
        found[f"textbook, NHWC, {precision}"] = textbook("autocast", channels_last=True, precision=precision)
    if device.type == "cpu":
        plain: dict[str, Any] = {"batched": False, "memory": False, "small_maps": False}
        found |= {
            "ours, fp32, views separate": ours("NHWC; LARS and average in one pass", **plain),
            "ours, fp32, + views batched": ours("both views in each of two passes", memory=False, small_maps=False),
            "ours, fp32, + freed memory kept": ours("keep_freed_memory", small_maps=False),
            "ours, fp32, + small maps": ours("use_small_map_convolutions"),
        }
        if precision != "fp32":
            found[f"ours, {precision}, none of the last three"] = ours("views separate", precision=precision, **plain)
    else:
        found["ours, fp32, eager, views separate"] = ours("NHWC; LARS and average in one pass", batched=False)
        found["ours, fp32, eager"] = ours("both views in each of two passes")
    for mode in modes:
        found[f"ours, {precision}, {mode}"] = ours(f"mode {mode}", precision=precision, mode=mode)
    return found


# ------------------------------------------------------------------------------------------------ correctness


def check(problem: Problem) -> list[str]:
    """What shows that those who should compute the same thing do.

    In float64 ours ends at the textbook's weights; the packages' losses are the textbook's. On four images: what is
    computed does not depend on how many there are. TF32 is off: it would differ by more than is allowed here.

    Raises:
        AssertionError: they do not.
    """
    EXACT.apply()
    small = dataclasses.replace(problem, batch_size=4, hidden_dim=64)
    plain, fused = Textbook(small, dtype=torch.float64), Ours(small, dtype=torch.float64, optimizer="sgd")
    told = [_agree("ours, float64", fused(), plain(), 1e-11) for _ in range(2)]
    online = [*plain.online.parameters(), *plain.predictor.parameters()]
    for what, found, expected in (
        ("online weights", fused.model.online.parameters(), online),
        ("target weights", fused.model.target.parameters(), plain.target.parameters()),
        ("target statistics", fused.model.target.buffers(), plain.target.buffers()),
    ):
        worst = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
        told.append(f"ours and the textbook after 2 steps in float64, {what}: relative difference {worst:.1e}")
        if not worst < 1e-9:
            raise AssertionError(told[-1])
    expected_loss, mixed = Textbook(small)(), Textbook(small, concat=True)()
    told.append(_agree("ours, fp32", Ours(small)(), expected_loss, 1e-4))
    # What each package's loss has to be multiplied with and raised by, and whose it is then.
    scales = {
        "lightly": (4, 4, expected_loss),
        "stable-pretraining": (2, 0, expected_loss),
        "byol-pytorch": (1, 0, mixed),
    }
    for name, contender in peers(torch.device(problem.device)).items():
        if name in scales and contender.is_installed:
            factor, constant, loss = scales[name]
            theirs = _build(contender.kind, small, contender.options)()
            told.append(_agree(name, factor * theirs + constant, loss, 1e-4))
    return told


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-12))


def _agree(what: str, found: Tensor, expected: Tensor, bound: float) -> str:
    off = _difference(found, expected)
    line = f"loss of {what}: {float(found):.6f}, textbook {float(expected):.6f}"
    if not off <= bound:
        raise AssertionError(f"{line}: relative difference {off:.1e}, allowed {bound:.0e}")
    return line
