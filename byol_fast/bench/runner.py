"""The suites of `byol-fast bench`."""

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

from byol_fast.bench import agreement, candidates, data, end_to_end, kernels, photometric
from byol_fast.bench.candidates import BASELINE, Candidate
from byol_fast.bench.counting import library_versions
from byol_fast.bench.counting import measure as measure_operators
from byol_fast.bench.options import SUITES, Options
from byol_fast.bench.problem import Problem
from byol_fast.bench.processes import Job, Measurement
from byol_fast.bench.processes import measure as measure_processes
from byol_fast.bench.results import Results
from byol_fast.bench.synthetic_jpegs import write_synthetic_jpegs
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.data import ImageSource, open_source
from byol_fast.training.mode import resolve_mode
from byol_fast.utils.device import resolve_device
from byol_fast.utils.files import check_output_folder
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.progress import current

ROUNDS = {"peers": 7, "kernels": 11, "data": 5, "stages": 5, "step": 5, "end-to-end": 5}
WARMUP = 2


class Bench:
    """A run of `byol-fast bench`.

    Args:
        options: of the command.

    Raises:
        ConfigError: options that contradict each other or do not suit this machine.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        config = recipes.get(options.recipe) if options.recipe else None
        self.problem = _problem(options, config, self.device)
        self.precision = resolve_precision(options.precision, self.device)
        mode_config = Config(mode=options.mode, device=options.device)
        self.mode = resolve_mode(mode_config, self.device, self.precision).name
        self.threads = options.threads or (1 if self.device.type == "cpu" else 0)
        self.timeout_s: float | None = None
        """Longest time of a call in seconds; None for no limit, because a compilation may take minutes."""
        self.folder = options.save or Path("bench") / f"{datetime.now():%Y%m%d-%H%M%S}"

    def run(self) -> None:
        """Measure the selected suites and save each one when it is finished.

        Raises:
            ConfigError: the folder for the results cannot be written; nothing is measured.
        """
        check_output_folder(self.folder, "bench", "choose another folder with --save")
        if self.threads:
            torch.set_num_threads(self.threads)
        threads = f"{self.threads or torch.get_num_threads()} threads" if self.device.type == "cpu" else "all cores"
        libraries = ", ".join(f"{name} {version}" for name, version in library_versions().items())
        libraries = libraries or "none installed (pip install '.[peers]' in the clone)"
        print(f"{self.device}, {threads}, load {os.getloadavg()[0]:.1f}; other libraries: {libraries}", flush=True)
        if self.options.precision == "auto" and self.precision.name == "fp32":
            print("bf16 is left out, because this CPU has no instructions for it (--precision bf16 measures it)")
        for name in self.options.suites or [s for s in SUITES if s != "stages"]:
            print(f"\n== {name}", flush=True)
            results = Results(name, self.device, self.settings())
            # Of what takes long without a bar of its own, such as building the candidates.
            with current().bar(None, f"suite {name}"):
                getattr(self, name.replace("-", "_"))(results, self.options.rounds or ROUNDS[name])
            for path in results.save(self.folder):
                print(f"  {path}")

    def settings(self) -> dict[str, object]:
        """Options of the measurement, for the record."""
        return {
            **asdict(self.problem),
            "precision": self.precision.name,
            "mode": self.mode,
            "threads": self.threads,
            "recipe": self.options.recipe,
            "images": "synthetic" if self.options.images is None else "the user's",
            "libraries": library_versions(),
        }

    def _is_selected(self, name: str) -> bool:
        return not self.options.only or any(text in name for text in self.options.only)

    # ------------------------------------------------------------------ suites

    def kernels(self, results: Results, rounds: int) -> None:
        """Loss, EMA and LARS; color and blur."""
        for name, build in kernels.suites().items():
            if self._is_selected(name):
                with current().bar(None, f"{name}: comparing the results of the candidates"):
                    suite = build(str(self.device))
                measure_operators(results, name, suite, rounds=rounds)
        num_images = self.options.kernel_images or (32 if self.device.type == "cpu" else 512)
        problem = photometric.Problem(num_images, str(self.device))
        for name, build_suite in photometric.SUITES.items():
            if self._is_selected(name):
                with current().bar(None, f"{name}: comparing the results of the candidates"):
                    suite = build_suite(problem)
                measure_operators(results, name, suite, rounds=rounds, num_items=num_images)

    def data(self, results: Results, rounds: int) -> None:
        """Two views of images."""
        num_images = self.options.data_images or (64 if self.device.type == "cpu" else 1024)
        with _images(self.options.images) as photos:
            for name, views, source, factor in (
                ("two 224 px views from JPEG", data.JPEG_VIEWS, photos, 1),
                ("two 32 px views from arrays", data.ARRAY_VIEWS, data.small_arrays(photos), 8),
            ):
                data.run_suite(
                    results,
                    name,
                    source,
                    views,
                    num_images=factor * num_images,
                    rounds=rounds,
                    is_selected=self._is_selected,
                )

    def stages(self, results: Results, rounds: int) -> None:
        """The CPU loader, one operation at a time."""
        with _images(self.options.images) as source:
            data.stages(results, source, num_images=self.options.data_images or 64, rounds=rounds)

    def step(self, results: Results, rounds: int) -> None:
        """From the baseline's step to byol_fast's, one change at a time, and every mode."""
        on_gpu = self.device.type == "cuda"
        modes = ("eager", "compile", "graph") if on_gpu and self.options.mode == "auto" else (self.mode,)
        steps = candidates.ablation_candidates(self.device, self.precision.name, modes)
        self.measure_steps(results, "a step, from the baseline to byol_fast", steps, rounds)

    def peers(self, results: Results, rounds: int) -> None:
        """A step of other libraries and of byol_fast."""
        steps = candidates.library_candidates(self.device, self.precision.name)
        self.measure_steps(results, "a step of each library", steps, rounds)

    def measure_steps(self, results: Results, name: str, steps: Mapping[str, Candidate], rounds: int) -> None:
        """Time steps, the baseline's among them, each in a process of its own.

        Args:
            results: that the suite is added to.
            name: of the suite.
            steps: candidates by name; those that are not installed are skipped.
            rounds: interleaved rounds that are counted.

        Raises:
            ConfigError: candidates disagree, or the baseline cannot run here.
        """
        _check_agreement(self.problem)
        for missing in [n for n, c in steps.items() if not c.is_installed]:
            print(f"  {missing} is not installed, skipped (pip install '.[peers]' in the clone)")
        selected = {n: c for n, c in steps.items() if c.is_installed and (n == BASELINE or self._is_selected(n))}
        jobs = {n: c.job(self.problem) for n, c in selected.items()}
        notes = {n: {"version": c.version, "note": c.note} for n, c in selected.items()}
        self._measure_jobs(results, name, jobs, rounds, self.problem.batch_size, BASELINE, notes)

    def end_to_end(self, results: Results, rounds: int) -> None:
        """From images to trained weights."""
        steps = self.options.steps_per_round
        with _image_folder(self.options.images) as folder:
            jobs = end_to_end.build_jobs(
                self.problem,
                folder,
                steps=steps,
                precision=self.precision.name,
                mode=self.mode,
                lightly="lightly" in library_versions(),
            )
            baseline = next(iter(jobs))
            jobs = {n: job for n, job in jobs.items() if n == baseline or self._is_selected(n)}
            num_images = self.problem.batch_size * steps
            self._measure_jobs(results, "from images to trained weights", jobs, rounds, num_images, baseline, {})

    def _measure_jobs(
        self,
        results: Results,
        name: str,
        jobs: Mapping[str, Job],
        rounds: int,
        num_images: int,
        baseline: str,
        notes: Mapping[str, dict[str, str]],
    ) -> None:
        measurements = measure_processes(
            jobs,
            rounds=rounds,
            warmup=WARMUP,
            threads=self.threads,
            device=self.device,
            timeout_s=self.timeout_s,
            description=name,
        )
        for failed, reason in {n: m.failure for n, m in measurements.items() if m.failure}.items():
            print(f"  {failed} failed and is dropped: {reason}")
        completed = {n: m for n, m in measurements.items() if not m.failure}
        if baseline not in completed:
            raise ConfigError(f"bench: {baseline!r} cannot run here, so there is nothing to compare with; see above")
        # With one thread on a CPU, CPU time is least disturbed by other processes.
        wall = self.device.type != "cpu" or self.threads != 1
        problem = f"{self.problem.encoder}, {self.problem.batch_size} images of {self.problem.image_size} px"
        results.add(
            f"{name}: {problem}, {'wall time' if wall else 'CPU time'}",
            {n: m.timing(wall=wall) for n, m in completed.items()},
            unit="images/s" if wall else "images/CPU-s",
            num_items=num_images,
            baseline=baseline,
            extras={n: {**_rounded(m), **notes.get(n, {})} for n, m in completed.items()},
        )


def _rounded(measurement: Measurement) -> dict[str, float | str]:
    return {n: value if isinstance(value, str) else round(float(value), 4) for n, value in measurement.extras.items()}


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
                f"bench: recipe must have projectors of 2 layers, got {options.recipe!r} with "
                f"{config.model.projector_layers}; name another recipe, or --encoder"
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


def _check_agreement(problem: Problem) -> None:
    """Check in a separate process, whose memory and flags are gone afterwards, that candidates agree.

    Raises:
        ConfigError: candidates disagree.
    """
    sys.stdout.flush()
    process = multiprocessing.get_context("spawn").Process(
        target=_print_lines, args=(agreement.check_agreement, problem)
    )
    with current().bar(None, "checking that the candidates agree"):
        process.start()
        process.join()
    if process.exitcode:
        raise ConfigError("bench: candidates disagree or cannot run (see above), so nothing is timed")


def _print_lines(function: Callable[[Problem], list[str]], problem: Problem) -> None:
    for line in function(problem):
        print(f"  {line}", flush=True)


@contextmanager
def _image_folder(images: Path | None) -> Iterator[Path]:
    if images is not None:
        yield images
        return
    with tempfile.TemporaryDirectory() as folder:
        with current().bar(None, "writing synthetic JPEGs"):
            images = write_synthetic_jpegs(Path(folder), 128)
        yield images


@contextmanager
def _images(images: Path | None) -> Iterator[ImageSource]:
    with _image_folder(images) as folder:
        yield open_source(folder)
