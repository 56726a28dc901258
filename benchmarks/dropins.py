"""The drop-ins of `byol_fast.compat` beside what they stand in for: how far apart the numbers are, and how fast.

    python -m benchmarks.dropins [--rounds N] [--device cuda] [--only TEXT] [--photographs FOLDER] [--save FOLDER]

Needs `pip install byol_fast[peers]`. Both sides of a pair work on the same memory (as in `byol_fast.bench.kernels`): a
ResNet-50 with the paper's heads. Before a pair is timed, five steps of each from the same start are compared, and the
largest difference is kept with the times. One thread: the process's CPU time.
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

from byol_fast.bench.counting import Case, Suite, is_installed, measure, peer_versions
from byol_fast.bench.kernels import DECAY, LR, MOMENTUM, TAU, Weights
from byol_fast.bench.results import Results
from byol_fast.bench.timing import interleaved
from byol_fast.compat import lightly, timm
from byol_fast.compat import torch as swa
from byol_fast.data import open_source
from byol_kernels import LARS

Make = Callable[[], tuple[Suite, dict[str, float]]]
"""Makes a suite, and says how far each case is from the peer's numbers."""
STEPS = 5


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest difference of partners in units of the largest value of each tensor."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        a, b = mine.detach().double(), theirs.detach().double()
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
            # Plus 1, as cosines of random rows are all but 0: a relative difference of that would say nothing.
            return [1 + value.detach(), *torch.autograd.grad(value, [p1, p2])]

        return run

    ours, theirs = gradients(lightly.NegativeCosineSimilarity()), gradients(NegativeCosineSimilarity())
    off = {"ours": difference(ours(), theirs())}
    repeats = max(1, 2048 // batch)

    def repeated(case: Callable[[], list[Tensor]]) -> Case:
        return lambda: [case() for _ in range(repeats)]

    moved = 6 * p1.numel() * p1.element_size()
    return Suite({"ours": repeated(ours), "lightly": repeated(theirs)}, moved, repeats, "lightly"), off


# ------------------------------------------------------------------------------------------------ averages


def after(steps: int, case: Case, w: Weights) -> list[Tensor]:
    """Weights and target after some calls from the start; gradients stay, the weights move between averages."""
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
        "ours": lambda: lightly.update_momentum(online, target, TAU),
        "lightly": lambda: update_momentum(online, target, TAU),
    }
    off = {"ours": difference(after(STEPS, cases["ours"], w), after(STEPS, cases["lightly"], w))}
    return Suite(cases, 12 * sum(t.numel() for t in w.target), 1, "lightly"), off


def same_memory(module: nn.Module, other: nn.Module) -> None:
    """Let a copy of a network lie where another copy does."""
    for mine, theirs in ((module.parameters(), other.parameters()), (module.buffers(), other.buffers())):
        for tensor, place in zip(mine, theirs, strict=True):
            tensor.data = place.data


def averages(device: str, make: Callable[[nn.Module], dict[str, Any]], peer: str) -> tuple[Suite, dict[str, float]]:
    """Averages of a whole ResNet-50, as a pair of wrappers with `.module` does them."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50().to(device)
    wrappers = make(model)
    ours, theirs = wrappers["ours"][0].module, wrappers[peer][0].module
    start = copy.deepcopy(theirs.state_dict())
    ends = []
    for wrapper, update in wrappers.values():
        wrapper.module.load_state_dict(start)
        moving = copy.deepcopy(model)
        for _ in range(STEPS):
            with torch.no_grad():
                torch._foreach_add_(list(moving.parameters()), 1e-3)
            update(moving)
        ends.append([p.detach().clone() for p in wrapper.module.state_dict().values()])
    off = {"ours": difference(*ends)}
    same_memory(ours, theirs)
    cases: dict[str, Case] = {name: partial(update, model) for name, (_, update) in wrappers.items()}
    return Suite(cases, 12 * sum(p.numel() for p in model.parameters()), 1, peer), off


def timm_average(device: str) -> tuple[Suite, dict[str, float]]:
    from timm.utils.model_ema import ModelEmaV3

    def make(model: nn.Module) -> dict[str, Any]:
        ours, theirs = timm.ModelEmaV3(model, decay=TAU), ModelEmaV3(model, decay=TAU)
        return {"ours": (ours, ours.update), "timm": (theirs, theirs.update)}

    return averages(device, make, "timm")


def torch_average(device: str) -> tuple[Suite, dict[str, float]]:
    def make(model: nn.Module) -> dict[str, Any]:
        found = {}
        for name, function in (("ours", swa.get_ema_multi_avg_fn), ("torch", swa_utils.get_ema_multi_avg_fn)):
            kind = swa.AveragedModel if name == "ours" else swa_utils.AveragedModel
            average = kind(model, multi_avg_fn=function(TAU))
            average.update_parameters(model)  # the first call copies
            found[name] = (average, average.update_parameters)
        return found

    return averages(device, make, "torch")


# ------------------------------------------------------------------------------------------------ optimizer


def lars(device: str) -> tuple[Suite, dict[str, float]]:
    from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

    w = Weights(device)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "ours": lightly.LARS(w.groups(), lr=LR, momentum=MOMENTUM),
        "lightly": LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM),
        "byol_kernels.LARS, the reference's rule": LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    }
    ends = {}
    for name, optimizer in optimizers.items():
        w.share(optimizer)
        ends[name] = after(STEPS, optimizer.step, w)
    off = {name: difference(end, ends["lightly"]) for name, end in ends.items() if name != "lightly"}
    w.reset()
    cases: dict[str, Case] = {name: optimizer.step for name, optimizer in optimizers.items()}
    return Suite(cases, 20 * sum(p.numel() for p in w.online), 1, "lightly"), off


# ------------------------------------------------------------------------------------------------ views


def views(results: Results, folder: Path, rounds: int) -> None:
    """Both views of decoded photographs, one image a call, as a data set's `__getitem__` would make them."""
    from lightly.transforms import byol_transform as peer

    source = open_source(folder)
    pictures = [source.load(i) for i in range(min(16, len(source)))]
    kinds = {"ours": lightly.BYOLTransform(), "lightly": peer.BYOLTransform()}
    levels = {
        name: torch.stack([torch.stack(pair(picture.resize((256, 256)))) for picture in pictures])
        for name, pair in {
            # Without chance: whole images (a crop of all of it fits a square alone), grey.
            name: module.BYOLTransform(*(kind(min_scale=1.0, cj_prob=0, random_gray_scale=1, gaussian_blur=0,
                                              solarization_prob=0, hf_prob=0, normalize=None)
                                         for kind in (module.BYOLView1Transform, module.BYOLView2Transform)))
            for name, module in (("ours", lightly), ("lightly", peer))
        }.items()
    }  # fmt: skip
    off = float((levels["ours"] - levels["lightly"]).abs().max())

    def both(pair: Callable[[Any], object]) -> object:
        return [pair(picture) for picture in pictures]

    cases: dict[str, Case] = {name: partial(both, pair) for name, pair in kinds.items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(cases, rounds=rounds, clock=clock)
    results.add(
        "BYOLTransform, 224 px",
        times,
        unit="images/CPU-s" if torch.get_num_threads() == 1 else "images/s",
        amount=len(pictures),
        baseline="lightly",
        extras={"ours": {"difference": off}},
    )


def suites(device: str) -> dict[str, tuple[str, Make]]:
    """Name, the package that must be installed, and how to make it."""
    found: dict[str, tuple[str, Make]] = {}
    for batch in (256, 4096):
        found[f"NegativeCosineSimilarity, {batch} x 256"] = "lightly", partial(loss, device, batch)
    return found | {
        "update_momentum": ("lightly", lambda: momentum(device)),
        "LARS": ("lightly", lambda: lars(device)),
        "ModelEmaV3.update": ("timm", lambda: timm_average(device)),
        "AveragedModel.update_parameters, get_ema_multi_avg_fn": ("torch", lambda: torch_average(device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--only", default="", help="suites whose name contains this")
    parser.add_argument("--photographs", type=Path, help="folder of images for the views; without it they are left out")
    parser.add_argument("--save", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    print(f"load of the machine {', '.join(f'{number:.1f}' for number in os.getloadavg())}")
    settings = {"rounds": arguments.rounds, "threads": torch.get_num_threads(), "peers": peer_versions()}
    results = Results("dropins", arguments.device, settings)
    for name, (needs, make) in suites(arguments.device).items():
        if arguments.only not in name or not is_installed(needs):
            continue
        suite, off = make()
        measure(results, name, suite, rounds=arguments.rounds)
        for contender in results.suites[-1].contenders:
            if contender.name in off:
                contender.extras["difference"] = off[contender.name]
                print(f"    {contender.name}: largest relative difference {off[contender.name]:.1e}")
    if arguments.photographs and arguments.only in "BYOLTransform" and is_installed("lightly"):
        views(results, arguments.photographs, arguments.rounds)
    if arguments.save:
        for path in results.save(arguments.save):
            print(path)


if __name__ == "__main__":
    main()
