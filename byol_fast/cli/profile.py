"""`byol-fast profile`."""

from __future__ import annotations

import os
from pathlib import Path

from byol_fast import config as configs
from byol_fast.cli.options import find_recipe, parse_config, print_error
from byol_fast.cli.train import run_folder, take_run
from byol_fast.config import ConfigError
from byol_fast.config.fields import ProfiledSteps, check
from byol_fast.training.preflight import check_start

USAGE = """\
usage: byol-fast profile RECIPE [FOLDER] [--steps N] [--option value ...]
       byol-fast profile --resume RUN [--steps N] [--option value ...]

Runs N steps (20) as in training without saving weights, measures where their time goes, and suggests changes.
Writes OUT/NAME/profile/: profile.html, profile.json, trace.json.gz for Perfetto, and on a GPU a memory snapshot.
`byol-fast profile RECIPE --help` lists every option of the run with the recipe's value.
"""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    resume, argv = take_run("--resume", argv)
    steps, argv = _take_steps(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if (name is None) == (resume is None):
        print(USAGE, end="")
        is_help = argv and argv[0] in {"-h", "--help"}
        return 0 if is_help else print_error("byol-fast profile: pass a recipe, or --resume RUN: one of the two", 2)
    resumed: Path | None = None
    if resume is not None:
        resumed = run_folder(resume, argv)
        stored = configs.load(resumed / "config.json")
        config = parse_config(stored, argv, f"byol-fast profile --resume {resume}")
    else:
        assert name is not None
        config = parse_config(find_recipe(name, "byol-fast profile"), argv, f"byol-fast profile {name}")

    check_start(config, resume=resumed)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; hides the log of its profiler
    from byol_fast.profiling.page import show
    from byol_fast.profiling.run import profile

    record, folder = profile(config, resume=resumed, steps=steps)
    show(record)
    print(folder / "profile.html")
    return 0


def _take_steps(argv: list[str]) -> tuple[int, list[str]]:
    """Split off `--steps N`: the number of profiled steps, not a field of the configuration."""
    rest: list[str] = []
    steps = "20"
    words = iter(argv)
    for word in words:
        if word == "--steps" or word.startswith("--steps="):
            steps = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    try:
        number = int(steps)
    except ValueError:
        raise ConfigError(f"byol-fast profile: --steps must be an integer, got {steps!r}") from None
    return check("byol-fast profile: --steps", ProfiledSteps, number), rest
