"""Everything that only a GPU can measure: `python -m benchmarks.gpu_bench`, or `make gpu-bench`.

Each part is a process of its own with a limit of time; one that fails does not stop the rest, and its results are saved
as they come, to `benchmarks/results/GPU`. `--only PART ...` runs some of them. The summary is of all that lies there,
from earlier runs, too. With --rehearse the same runs on the CPU with tiny sizes, and saves to a folder for temporary
files: not a figure of it means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_summary import summary
from byol_fast import environment
from byol_fast.bench import networks
from byol_fast.bench.networks import Contender, Ours, Problem
from byol_fast.bench.options import Options
from byol_fast.bench.photographs import write_photographs
from byol_fast.bench.results import Results
from byol_fast.bench.suites import Bench
from byol_fast.files import atomic_write
from byol_fast.profiling import inductor

ROOT = Path(__file__).parents[1]
MINUTES = 8.0
PATIENCE = 150.0
"""Seconds that a contender may compile in one call."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the parts work."""

    folder: Path
    rehearsal: bool

    @property
    def device(self) -> Any:
        """The GPU, or in a rehearsal the CPU."""
        return "cpu" if self.rehearsal else "cuda"

    def problem(self, name: str) -> Problem:
        """`resnet50` at 224 px, `resnet18` as CIFAR's recipe has it; in a rehearsal something small."""
        if self.rehearsal:
            tiny: dict[str, Any] = {"image_size": 32, "batch_size": 4, "hidden_dim": 32, "projection_dim": 16}
            return Problem(encoder="resnet18_narrow", cifar_stem=name == "resnet18", device="cpu", **tiny)
        if name == "resnet50":
            return Problem(encoder="resnet50", image_size=224, batch_size=128, device="cuda")
        return Problem(encoder="resnet18", cifar_stem=True, image_size=32, batch_size=256, device="cuda")

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Write a part's own JSON file, with where it was measured."""
        record = environment.measured_on(torch.device(self.device))
        atomic_write(self.folder / f"{name}.json", json.dumps({**content, "environment": record}, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ parts


def ceilings(run: Run) -> None:
    """What the memory copies, and what matrix products reach."""
    from dataclasses import asdict

    from byol_fast.profiling.ceilings import Dtype, measure

    found = []
    dtypes: tuple[Dtype, ...] = ("bf16", "tf32", "fp32")
    for dtype in dtypes:
        one = measure(torch.device(run.device), dtype, seconds=0.01 if run.rehearsal else 0.3)
        print(f"  {one.name}, {dtype}: {one.bytes_per_s / 1e12:.3f} TB/s, {one.flops_per_s / 1e12:.1f} TFLOP/s")
        found.append(asdict(one))
    run.save("ceilings", {"ceilings": found})


def kernels(run: Run) -> None:
    """Loss, average, LARS, colour and blur, beside a copy of memory."""
    some = ("EMA", "64 x 256 float32", "flip, colour", "blur")
    options = Options(
        suites=("kernels",),
        device=run.device,
        save=run.folder,
        rounds=1 if run.rehearsal else 11,
        kernel_images=2 if run.rehearsal else 512,
        only=some if run.rehearsal else (),
    )
    Bench(options).run()


def contenders(run: Run, *, compiled: bool) -> dict[str, Contender]:
    """The textbook's loop, lightly's, and ours in all modes."""
    device = torch.device(run.device)
    peers = networks.peers(device)
    found = {name: peers[name] for name in (networks.TEXTBOOK, "textbook, NHWC, bf16", "lightly")}
    if compiled:
        found["textbook, NHWC, bf16, torch.compile"] = networks.textbook(
            "as the textbook; autocast; networks and loss compiled", channels_last=True, precision="bf16", compiled=True
        )
    modes = ("eager",) if run.rehearsal else ("eager", "compile", "graph")
    return found | {n: c for n, c in networks.switches(device, "bf16", modes).items() if n.startswith("ours")}


def step(run: Run, name: str) -> None:
    """A step of a network in all modes, beside the loops that people write."""
    bench = Bench(Options(device=run.device, save=run.folder, precision="bf16"))
    bench.problem, bench.patience = run.problem(name), PATIENCE
    results = Results(name, bench.device, bench.settings())
    # Compiling on a CPU takes a minute: rehearsing it once is enough.
    several = contenders(run, compiled=not run.rehearsal or name == "resnet18")
    bench.steps(results, "a step", several, 1 if run.rehearsal else 7)
    results.save(run.folder)


def data(run: Run) -> None:
    """Two views of images, from JPEG and from arrays, by our loaders."""
    small = run.rehearsal
    options = Options(
        suites=("data",),
        device=run.device,
        save=run.folder,
        rounds=1 if small else 5,
        data_images=8 if small else 1024,
        only=("ours",),
    )
    Bench(options).run()


def end_to_end(run: Run) -> None:
    """From JPEG to trained weights: whether the loader keeps up with the step."""
    name = "end-to-end"
    bench = Bench(
        Options(
            device=run.device,
            save=run.folder,
            precision="bf16",
            mode="eager" if run.rehearsal else "graph",
            steps_per_round=1 if run.rehearsal else 4,
            only=("ours, bf16",),
        )
    )
    bench.problem, bench.patience = run.problem("resnet50"), PATIENCE
    results = Results(name, bench.device, bench.settings())
    bench.end_to_end(results, 1 if run.rehearsal else 5)
    results.save(run.folder)


def profile(run: Run) -> None:
    """`byol-fast profile` of ResNet-50, eager, so that the phases are seen and nothing has to be compiled."""
    from byol_fast import config as configs
    from byol_fast import recipes
    from byol_fast.profiling.page import show
    from byol_fast.profiling.run import profile as profiled

    with tempfile.TemporaryDirectory() as temporary:
        photographs = write_photographs(Path(temporary) / "photographs", 8 if run.rehearsal else 64)
        for copy in range(0 if run.rehearsal else 15):
            for path in sorted(photographs.glob("???.jpg")):
                os.link(path, photographs / f"{path.stem}-{copy}.jpg")
        changes: dict[str, Any] = {
            "data.root": photographs,
            "device": run.device,
            "mode": "eager",
            "precision": "bf16",
            "batch_size": 128,
            "steps": 1000,
            "out": Path(temporary) / "runs",
            "name": "profile",
        }
        if run.rehearsal:
            view = {"size": 32, "blur": 0.1}
            model = {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16}
            changes |= {"batch_size": 4, "view1": view, "view2": view, "model": model, "precision": "fp32"}
        config = configs.replace(recipes.imagenet_resnet50(), changes)
        found, folder = profiled(config, steps=2 if run.rehearsal else 20)
        show(found)
        for kind in ("json", "html"):
            shutil.copy(folder / f"profile.{kind}", run.folder / f"profile.{kind}")


def code(run: Run) -> None:
    """What inductor made of a ResNet-50 step under max-autotune, and the memory that each kernel moves."""
    from torch._inductor.utils import run_and_get_code

    ours = tuned_step(run)
    begin = time.perf_counter()
    _, sources = run_and_get_code(ours)
    print(f"  compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    found = inductor.analyse(sources)
    print("\n".join(f"  {answer}" for answer in found["answers"]))
    text = "\n\n# ---- another graph ----\n\n".join(sources)
    atomic_write(run.folder / "inductor_code.py.txt", text)
    found |= {"seconds": kernel_times(run, ours), "memory": [], "memory_by_family": [], "ncu": ""}
    run.save("inductor", found)  # before ncu, which may take its time
    del ours
    if not run.rehearsal:
        torch.cuda.empty_cache()
    printed, found["ncu"] = under_ncu(run)
    found["memory"] = inductor.read_ncu(printed)
    found["memory_by_family"] = inductor.by_family(found["memory"])
    print(f"  ncu: {found['ncu']}")
    for entry in found["memory_by_family"]:
        print(f"  {entry['family']:<22}{entry['launches']:5d} launches {entry['gb']:8.2f} GB {entry['ms']:8.2f} ms")
    run.save("inductor", found)


def tuned_step(run: Run) -> Ours:
    """A step as the mode graph compiles it, without the capture."""
    ours = Ours(run.problem("resnet50"), precision="bf16", mode="compile" if run.rehearsal else "graph")
    ours.step.run = ours.step.body
    return ours


def kernel_times(run: Run, ours: Ours) -> list[dict[str, Any]]:
    """Kernels of a step by name, those that take longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for _ in range(2):
        ours()
    activity = ProfilerActivity.CPU if run.rehearsal else ProfilerActivity.CUDA
    with torch_profile(activities=[activity]) as trace:
        ours()
        if not run.rehearsal:
            torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in trace.events() or []:
        if run.rehearsal or str(event.device_type).endswith("CUDA"):
            entry = found.setdefault(event.name, {"kernel": event.name, "launches": 0, "ms": 0.0})
            entry["launches"] += 1
            entry["ms"] += event.time_range.elapsed_us() / 1e3
    return sorted(found.values(), key=lambda entry: -entry["ms"])


def one_step(run: Run) -> None:
    """The program that ncu watches: it profiles one step, after two that warm up."""
    ours = tuned_step(run)
    for _ in range(2):
        ours()
    if run.rehearsal:
        ours()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
    ours()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


def under_ncu(run: Run) -> tuple[str, str]:
    """What ncu prints about a step, and how that went."""
    ncu = shutil.which("ncu")
    if ncu is None and not run.rehearsal:
        return "", "not installed"
    watch = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"] if ncu else []
    watch += ["--clock-control", "none", "--target-processes", "application-only"] if ncu else []
    watch += ["--metrics", ",".join(inductor.NCU_METRICS)] if ncu else []
    command = [*filter(None, watch), *part_command(run, "one_step")]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired:
        return "", "not done after 150 s"
    if not ncu:
        return "", f"not installed; its program ended with {done.returncode} {done.stderr[-300:]}".strip()
    if not inductor.read_ncu(done.stdout):
        return "", f"no table, exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
    return done.stdout, "ok"


class Part:
    """A part and its limit.

    Args:
        work: what it does.
        seconds: that it may take on a GPU.
    """

    def __init__(self, work: Callable[[Run], None], seconds: float) -> None:
        self.work, self.seconds = work, seconds


def resnet50(run: Run) -> None:
    """ResNet-50, 224 px."""
    step(run, "resnet50")


def resnet18(run: Run) -> None:
    """ResNet-18 with CIFAR's stem, 32 px."""
    step(run, "resnet18")


PARTS = {
    "ceilings": Part(ceilings, 40),
    "kernels": Part(kernels, 100),
    "resnet50": Part(resnet50, 280),
    "inductor": Part(code, 280),
    "resnet18": Part(resnet18, 200),
    "data": Part(data, 70),
    "profile": Part(profile, 90),
    "end_to_end": Part(end_to_end, 90),
}

# ------------------------------------------------------------------------------------------------ all of them


def slug(device: str) -> str:
    """Folder of a device's results: `h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_")


def part_command(run: Run, name: str) -> list[str]:
    """How to run a part in a process."""
    return [sys.executable, "-m", "benchmarks.gpu_bench", "--part", name, "--save", str(run.folder)] + (
        ["--rehearse"] if run.rehearsal else []
    )


def run_part(run: Run, name: str, seconds: float) -> str:
    """Run a part, printing what it prints; how it ended: `""`, or what went wrong."""
    process = subprocess.Popen(part_command(run, name), cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"was not done after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "" if code == 0 else f"FAILED, exit code {code}: see above"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU")
    parser.add_argument("--minutes", type=float, help=f"for everything; {MINUTES:g}, in a rehearsal 60")
    parser.add_argument("--save", type=Path, help="folder of the results; benchmarks/results/GPU by default")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if options.part:
        run = Run(folder=options.save, rehearsal=options.rehearse)
        one_step(run) if options.part == "one_step" else PARTS[options.part].work(run)
        return 0
    begin = time.monotonic()
    if options.rehearse:
        folder = options.save or Path(tempfile.mkdtemp(prefix="gpu-bench-"))
        if (ROOT / "benchmarks" / "results") in folder.resolve().parents:
            parser.error(f"--save: a rehearsal measures nothing and must stay out of benchmarks/results, got {folder}")
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse (REHEARSE=1) runs the same on the CPU")
    else:
        folder = options.save or ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder=folder.resolve(), rehearsal=options.rehearse)
    deadline = begin + 60 * (options.minutes or (60 if options.rehearse else MINUTES))
    ends: dict[str, str] = {}
    for name in options.only or PARTS:
        left = deadline - time.monotonic()
        print(f"\n==== {name}", flush=True)
        started = time.monotonic()
        limit = min(left, 1800 if options.rehearse else PARTS[name].seconds)
        problem = run_part(run, name, limit) if left > 10 else "was not begun: no time left"
        ends[name] = f"{problem or 'ok'} ({time.monotonic() - started:.0f} s)"
        print(f"---- {name}: {ends[name]}", flush=True)
        (run.folder / "summary.md").write_text(summary(run.folder, rehearsal=run.rehearsal))
    record = environment.measured_on(torch.device(run.device))
    atomic_write(run.folder / "environment.json", json.dumps(record, indent=2) + "\n")
    print("\n" + (run.folder / "summary.md").read_text())
    print("\n".join(f"{name:<12}{end}" for name, end in ends.items()))
    print(f"{run.folder}; {time.monotonic() - begin:.0f} s")
    return 0 if all(end.startswith("ok") for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
