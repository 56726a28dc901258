"""What `byol-fast bench` measures."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from byol_fast.bench import data, end_to_end, kernels, networks, photometric
from byol_fast.bench.counting import measure as measure_operators
from byol_fast.bench.counting import peer_versions
from byol_fast.bench.networks import Contender, Problem
from byol_fast.bench.options import SUITES, Options
from byol_fast.bench.photographs import write_photographs
from byol_fast.bench.processes import Job, Measured
from byol_fast.bench.processes import measure as measure_processes
from byol_fast.bench.results import Results
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.data import ImageSource, open_source
from byol_fast.training.mode import resolve_mode
from byol_fast.utils.device import resolve_device
from byol_fast.utils.precision import resolve_precision

ROUNDS = {"peers": 7, "kernels": 11, "data": 5, "stages": 5, "step": 5, "end-to-end": 5}
WARMUP = 2


class Bench:
    """A measurement, as the options say.

    Args:
        options: of `byol-fast bench`.

    Raises:
        ConfigError: options that do not fit each other or this machine.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        on_cpu = self.device.type == "cpu"
        config = recipes.get(options.recipe) if options.recipe else None
        self.problem = _problem(options, config, self.device)
        self.precision = resolve_precision(options.precision, self.device)
        asked = Config(mode=options.mode, device=options.device)
        self.mode = resolve_mode(asked, self.device, self.precision).name
        self.threads = options.threads or (1 if on_cpu else 0)
        self.patience: float | None = None
        """Seconds after which a contender that does not answer is left out; None: it may compile for ever."""
        self.folder = options.save or Path("bench") / f"{datetime.now():%Y%m%d-%H%M%S}"
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"bench: save must be a folder, got the file {self.folder}")

    def run(self) -> None:
        """Measure all suites that were asked for, each saved as soon as it is done."""
        if self.threads:
            torch.set_num_threads(self.threads)
        threads = f"{self.threads or torch.get_num_threads()} threads" if self.device.type == "cpu" else "all cores"
        print(f"{self.device}, {threads}, load {os.getloadavg()[0]:.1f}; peers: {_listed(peer_versions())}", flush=True)
        for name in self.options.suites or [s for s in SUITES if s != "stages"]:
            print(f"\n== {name}", flush=True)
            results = Results(name, self.device, self.settings())
            getattr(self, name.replace("-", "_"))(results, self.options.rounds or ROUNDS[name])
            for path in results.save(self.folder):
                print(f"  {path}")

    def settings(self) -> dict[str, object]:
        """What was asked for, for the record."""
        return {
            **asdict(self.problem),
            "precision": self.precision.name,
            "mode": self.mode,
            "threads": self.threads,
            "recipe": self.options.recipe,
            "images": "synthetic" if self.options.images is None else "the user's",
            "peers": peer_versions(),
        }

    def _wanted(self, name: str) -> bool:
        return not self.options.only or any(text in name for text in self.options.only)

    # ------------------------------------------------------------------ suites

    def kernels(self, results: Results, rounds: int) -> None:
        """Loss, average, LARS; colour and blur."""
        for name, make in kernels.suites().items():
            if self._wanted(name):
                measure_operators(results, name, make(str(self.device)), rounds=rounds)
        images = self.options.kernel_images or (32 if self.device.type == "cpu" else 512)
        problem = photometric.Problem(images, str(self.device))
        for name, make_suite in photometric.SUITES.items():
            if self._wanted(name):
                measure_operators(results, name, make_suite(problem), rounds=rounds, amount=images)

    def data(self, results: Results, rounds: int) -> None:
        """Two views of images."""
        on_cpu = self.device.type == "cpu"
        images = self.options.data_images or (64 if on_cpu else 1024)
        with _images(self.options.images) as source:
            for name, views, which, factor in (
                ("two 224 px views from JPEG", data.JPEG_VIEWS, source, 1),
                ("two 32 px views from arrays", data.ARRAY_VIEWS, data.small_arrays(source), 8),
            ):
                data.run_suite(
                    results, name, which, views, images=factor * images, rounds=rounds, only=self.options.only
                )

    def stages(self, results: Results, rounds: int) -> None:
        """What the CPU's loader does, one thing at a time."""
        with _images(self.options.images) as source:
            data.stages(results, source, images=self.options.data_images or 64, rounds=rounds)

    def step(self, results: Results, rounds: int) -> None:
        """From the textbook's step to ours, one change at a time, and every mode."""
        on_gpu = self.device.type == "cuda"
        modes = ("eager", "compile", "graph") if on_gpu and self.options.mode == "auto" else (self.mode,)
        contenders = networks.switches(self.device, self.precision.name, modes)
        self.steps(results, "a step, from the textbook's to ours", contenders, rounds)

    def peers(self, results: Results, rounds: int) -> None:
        """A step of other packages', and ours."""
        self.steps(results, "a step beside other packages'", networks.peers(self.device), rounds)

    def steps(self, results: Results, name: str, contenders: Mapping[str, Contender], rounds: int) -> None:
        """Steps of contenders, the textbook's among them, in processes of their own.

        Args:
            results: where to put it.
            name: of the suite.
            contenders: by name; those that are not installed are left out.
            rounds: interleaved rounds that count.

        Raises:
            ConfigError: contenders disagree, or the textbook's cannot run here.
        """
        _check(self.problem)
        here = {n: c for n, c in contenders.items() if c.is_installed and (n == networks.TEXTBOOK or self._wanted(n))}
        for missing in [n for n, c in contenders.items() if not c.is_installed]:
            print(f"  {missing} is not installed: left out (pip install byol_fast[peers])")
        jobs = {n: c.job(self.problem) for n, c in here.items()}
        notes = {n: {"version": c.version, "note": c.note} for n, c in here.items()}
        self._processes(results, name, jobs, rounds, self.problem.batch_size, networks.TEXTBOOK, notes)

    def end_to_end(self, results: Results, rounds: int) -> None:
        """From images to trained weights."""
        steps = self.options.steps_per_round
        with _folder(self.options.images) as folder:
            jobs = end_to_end.jobs(
                self.problem,
                folder,
                steps=steps,
                precision=self.precision.name,
                mode=self.mode,
                lightly="lightly" in peer_versions(),
            )
            first = next(iter(jobs))
            jobs = {n: job for n, job in jobs.items() if n == first or self._wanted(n)}
            amount = self.problem.batch_size * steps
            self._processes(results, "from images to trained weights", jobs, rounds, amount, first, {})

    def _processes(
        self,
        results: Results,
        name: str,
        jobs: Mapping[str, Job],
        rounds: int,
        images: int,
        baseline: str,
        notes: Mapping[str, dict[str, str]],
    ) -> None:
        measured = measure_processes(
            jobs, rounds=rounds, warmup=WARMUP, threads=self.threads, device=self.device, patience=self.patience
        )
        for failed, why in {n: m.failure for n, m in measured.items() if m.failure}.items():
            print(f"  {failed} left out: {why}")
        done = {n: m for n, m in measured.items() if not m.failure}
        if baseline not in done:
            raise ConfigError(f"bench: {baseline!r} cannot run here, so there is nothing to compare with; see above")
        about = self.problem
        at = f"{about.encoder}, {about.batch_size} images of {about.image_size} px"
        clock = "wall time" if self._wall else "CPU time"
        results.add(
            f"{name}: {at}, {clock}",
            {n: m.timing(wall=self._wall) for n, m in done.items()},
            unit="images/s" if self._wall else "images/CPU-s",
            amount=images,
            baseline=baseline,
            extras={n: {**_rounded(m), **notes.get(n, {})} for n, m in done.items()},
        )

    @property
    def _wall(self) -> bool:
        """Time by the clock, except with one thread on a CPU: CPU time is then what other processes disturb least."""
        return self.device.type != "cpu" or self.threads != 1


def _rounded(measured: Measured) -> dict[str, float | str]:
    return {n: value if isinstance(value, str) else round(float(value), 4) for n, value in measured.extras.items()}


def _problem(options: Options, config: Config | None, device: torch.device) -> Problem:
    on_cpu = device.type == "cpu"
    if config is None:
        problem = Problem(
            encoder=options.encoder or ("resnet18" if on_cpu else "resnet50"),
            image_size=options.image_size or (64 if on_cpu else 224),
            batch_size=options.batch_size or (64 if on_cpu else 128),
            device=str(device),
        )
    else:
        if config.model.projector_layers != 2:
            raise ConfigError(
                f"bench: recipe {options.recipe!r} has heads that the textbook has not; name another, or --encoder"
            )
        problem = Problem(
            encoder=options.encoder or config.model.encoder,
            cifar_stem=config.model.cifar_stem and not options.encoder,
            image_size=options.image_size or config.view1.size,
            batch_size=options.batch_size or config.batch_size,
            hidden_dim=config.model.hidden_dim,
            projection_dim=config.model.projection_dim,
            device=str(device),
        )
    if problem.batch_size < 2:
        raise ConfigError(f"bench: batch_size must be at least 2, got {problem.batch_size}: batch norm needs two")
    return problem


def _check(problem: Problem) -> None:
    """Show that contenders agree, in a process of its own: nothing stays behind.

    Raises:
        ConfigError: contenders disagree.
    """
    sys.stdout.flush()
    checking = multiprocessing.get_context("spawn").Process(target=_tell, args=(networks.check, problem))
    checking.start()
    checking.join()
    if checking.exitcode:
        raise ConfigError("bench: contenders disagree or cannot run (see above), so nothing is timed")


def _tell(check: Callable[[Problem], list[str]], problem: Problem) -> None:
    for line in check(problem):
        print(f"  {line}", flush=True)


@contextmanager
def _folder(images: Path | None) -> Iterator[Path]:
    if images is not None:
        yield images
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_photographs(Path(folder), 128)


@contextmanager
def _images(images: Path | None) -> Iterator[ImageSource]:
    with _folder(images) as folder:
        yield open_source(folder)


def _listed(versions: Mapping[str, str]) -> str:
    if not versions:
        return "none installed (pip install byol_fast[peers])"
    return ", ".join(f"{name} {version}" for name, version in versions.items())
