"""Differences and speed of the drop-ins of `byol_fast.compat`, compared with the libraries that they replace.

    python -m benchmarks.dropins [--rounds N] [--device cuda] [--only TEXT] [--images FOLDER] [--save FOLDER]

Requires `pip install '.[peers]'`. Both sides of a pair work on the same memory (as in `byol_fast.bench.kernels`):
a ResNet-50 with the paper's heads. Before a pair is timed, five steps of each from the same start are compared, and the
largest difference is saved with the times. With one thread, CPU time of the process is measured.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from byol_fast.bench.counting import Case, Suite, is_installed, library_versions, measure
from byol_fast.bench.kernels import DECAY, LR, Weights
from byol_fast.bench.problem import MOMENTUM, TAU
from byol_fast.bench.results import Results
from byol_fast.bench.timing import interleaved
from byol_fast.compat import lightly, timm
from byol_fast.compat import torch as swa
from byol_fast.data import open_source
from byol_kernels import LARS

Build = Callable[[], tuple[Suite, dict[str, float]]]
"""Builds a suite, and compares the results of each case with the library's."""
STEPS = 5


def difference(values: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest difference of two lists of tensors, in units of the largest value of each tensor."""
    worst = 0.0
    for value, other in zip(values, expected, strict=True):
        a, b = value.detach().double(), other.detach().double()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


# ------------------------------------------------------------------------------------------------ loss


def loss(device: str, batch: int) -> tuple[Suite, dict[str, float]]:
    from lightly.loss import NegativeCosineSimilarity

    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(batch, 256, generator=generator).to(device) for _ in range(4))
    p1.requires_grad_()
    p2.requires_grad_()

    def gradients(negative_cosine: nn.Module) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            value = 0.5 * (negative_cosine(p1, z2) + negative_cosine(p2, z1))
            # Plus 1, because cosines of random rows are close to 0, where a relative difference says nothing.
            return [1 + value.detach(), *torch.autograd.grad(value, [p1, p2])]

        return run

    dropin, original = gradients(lightly.NegativeCosineSimilarity()), gradients(NegativeCosineSimilarity())
    differences = {"byol_fast": difference(dropin(), original())}
    repeats = max(1, 2048 // batch)

    def repeated(case: Callable[[], list[Tensor]]) -> Case:
        return lambda: [case() for _ in range(repeats)]

    min_bytes = 6 * p1.numel() * p1.element_size()
    return Suite(
        {"byol_fast": repeated(dropin), "lightly": repeated(original)}, min_bytes, repeats, "lightly"
    ), differences


# ------------------------------------------------------------------------------------------------ EMA


def results_after(steps: int, case: Case, w: Weights) -> list[Tensor]:
    """Weights and target after some calls from the initial state, with the weights moved after each."""
    w.reset()
    for _ in range(steps):
        case()
        with torch.no_grad():
            torch._foreach_add_(list[Tensor](w.online), 1e-3)
    return [x.detach().clone() for x in [*list[Tensor](w.online), *w.target]]


def momentum(device: str) -> tuple[Suite, dict[str, float]]:
    from lightly.models.utils import update_momentum

    w = Weights(device)
    online, target = w.modules()
    cases: dict[str, Case] = {
        "byol_fast": lambda: lightly.update_momentum(online, target, TAU),
        "lightly": lambda: update_momentum(online, target, TAU),
    }
    differences = {
        "byol_fast": difference(*(results_after(STEPS, cases[name], w) for name in ("byol_fast", "lightly")))
    }
    return Suite(cases, 12 * sum(t.numel() for t in w.target), 1, "lightly"), differences


def share_memory(module: nn.Module, other: nn.Module) -> None:
    """Make a copy of a network use the memory of another copy."""
    for tensors, others in ((module.parameters(), other.parameters()), (module.buffers(), other.buffers())):
        for tensor, shared in zip(tensors, others, strict=True):
            tensor.data = shared.data


def ema_suite(
    device: str, build: Callable[[nn.Module], dict[str, Any]], library: str
) -> tuple[Suite, dict[str, float]]:
    """EMA of a whole ResNet-50 by two wrappers with `.module`."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50().to(device)
    wrappers = build(model)
    dropin, original = wrappers["byol_fast"][0].module, wrappers[library][0].module
    start = copy.deepcopy(original.state_dict())
    results = []
    for wrapper, update in wrappers.values():
        wrapper.module.load_state_dict(start)
        moving = copy.deepcopy(model)
        for _ in range(STEPS):
            with torch.no_grad():
                torch._foreach_add_(list(moving.parameters()), 1e-3)
            update(moving)
        results.append([p.detach().clone() for p in wrapper.module.state_dict().values()])
    differences = {"byol_fast": difference(*results)}
    share_memory(dropin, original)
    cases: dict[str, Case] = {name: partial(update, model) for name, (_, update) in wrappers.items()}
    return Suite(cases, 12 * sum(p.numel() for p in model.parameters()), 1, library), differences


def timm_ema(device: str) -> tuple[Suite, dict[str, float]]:
    from timm.utils.model_ema import ModelEmaV3

    def build(model: nn.Module) -> dict[str, Any]:
        dropin, original = timm.ModelEmaV3(model, decay=TAU), ModelEmaV3(model, decay=TAU)
        return {"byol_fast": (dropin, dropin.update), "timm": (original, original.update)}

    return ema_suite(device, build, "timm")


def torch_ema(device: str) -> tuple[Suite, dict[str, float]]:
    def build(model: nn.Module) -> dict[str, Any]:
        wrappers = {}
        for name, function in (("byol_fast", swa.get_ema_multi_avg_fn), ("torch", swa_utils.get_ema_multi_avg_fn)):
            cls = swa.AveragedModel if name == "byol_fast" else swa_utils.AveragedModel
            average = cls(model, multi_avg_fn=function(TAU))
            average.update_parameters(model)  # the first call copies
            wrappers[name] = (average, average.update_parameters)
        return wrappers

    return ema_suite(device, build, "torch")


# ------------------------------------------------------------------------------------------------ optimizer


def lars(device: str) -> tuple[Suite, dict[str, float]]:
    from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

    w = Weights(device)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "byol_fast": lightly.LARS(w.groups(), lr=LR, momentum=MOMENTUM),
        "lightly": LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM),
        "byol_kernels.LARS, the reference's rule": LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    }
    results = {}
    for name, optimizer in optimizers.items():
        w.share_momentum(optimizer)
        results[name] = results_after(STEPS, optimizer.step, w)
    differences = {n: difference(r, results["lightly"]) for n, r in results.items() if n != "lightly"}
    w.reset()
    cases: dict[str, Case] = {name: optimizer.step for name, optimizer in optimizers.items()}
    return Suite(cases, 20 * sum(p.numel() for p in w.online), 1, "lightly"), differences


# ------------------------------------------------------------------------------------------------ views


def views(results: Results, folder: Path, rounds: int) -> None:
    """Both views of decoded images, one image per call, as in the `__getitem__` of a data set."""
    from lightly.transforms import byol_transform as library

    source = open_source(folder)
    images = [source.load(i) for i in range(min(16, len(source)))]
    transforms = {"byol_fast": lightly.BYOLTransform(), "lightly": library.BYOLTransform()}
    levels = {
        name: torch.stack([torch.stack(pair(image.resize((256, 256)))) for image in images])
        for name, pair in {
            # Without randomness: whole images (square ones, which a crop can cover), gray.
            name: module.BYOLTransform(*(cls(min_scale=1.0, cj_prob=0, random_gray_scale=1, gaussian_blur=0,
                                              solarization_prob=0, hf_prob=0, normalize=None)
                                         for cls in (module.BYOLView1Transform, module.BYOLView2Transform)))
            for name, module in (("byol_fast", lightly), ("lightly", library))
        }.items()
    }  # fmt: skip
    largest = float((levels["byol_fast"] - levels["lightly"]).abs().max())

    def both(pair: Callable[[Any], object]) -> object:
        return [pair(image) for image in images]

    cases: dict[str, Case] = {name: partial(both, pair) for name, pair in transforms.items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(cases, rounds=rounds, clock=clock)
    results.add(
        "BYOLTransform, 224 px",
        times,
        unit="images/CPU-s" if torch.get_num_threads() == 1 else "images/s",
        num_items=len(images),
        baseline="lightly",
        extras={"byol_fast": {"difference": largest}},
    )


def suites(device: str) -> dict[str, tuple[str, Build]]:
    """Name, package that must be installed, and function that builds the suite."""
    builders: dict[str, tuple[str, Build]] = {}
    for batch in (256, 4096):
        builders[f"NegativeCosineSimilarity, {batch} x 256"] = "lightly", partial(loss, device, batch)
    return builders | {
        "update_momentum": ("lightly", lambda: momentum(device)),
        "LARS": ("lightly", lambda: lars(device)),
        "ModelEmaV3.update": ("timm", lambda: timm_ema(device)),
        "AveragedModel.update_parameters, get_ema_multi_avg_fn": ("torch", lambda: torch_ema(device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--only", default="", help="suites whose name contains this")
    parser.add_argument("--images", type=Path, help="folder of images for the views, which are skipped without it")
    parser.add_argument("--save", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    print(f"load average {', '.join(f'{number:.1f}' for number in os.getloadavg())}")
    settings = {"rounds": arguments.rounds, "threads": torch.get_num_threads(), "libraries": library_versions()}
    results = Results("dropins", arguments.device, settings)
    for name, (package, build) in suites(arguments.device).items():
        if arguments.only not in name or not is_installed(package):
            continue
        suite, differences = build()
        measure(results, name, suite, rounds=arguments.rounds)
        for candidate in results.suites[-1].candidates:
            if candidate.name in differences:
                candidate.extras["difference"] = differences[candidate.name]
                print(f"    {candidate.name}: largest relative difference {differences[candidate.name]:.1e}")
    if arguments.images and arguments.only in "BYOLTransform" and is_installed("lightly"):
        views(results, arguments.images, arguments.rounds)
    if arguments.save:
        for path in results.save(arguments.save):
            print(path)


if __name__ == "__main__":
    main()
