"""`byol-fast train`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from byol_fast import config as configs
from byol_fast.cli.help import help_text
from byol_fast.cli.options import FREQUENT, RunOptions, find_recipe, is_given, last_value, parse_config, print_error
from byol_fast.cli.run_end import print_end
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.config.fields import expand_home
from byol_fast.training.extend import extend_config
from byol_fast.training.preflight import check_start
from byol_fast.training.resume import find_resumable, result_without_checkpoints
from byol_fast.training.run_dir import RunResult
from byol_fast.utils.commands import short_path
from byol_fast.utils.env import is_first_process

log = logging.getLogger(__name__)

USAGE = """\
usage: byol-fast train RECIPE [FOLDER] [--option value ...]
       byol-fast train --resume RUN [FOLDER]
       byol-fast train RECIPE [FOLDER] --resume auto [--option value ...]
       byol-fast train --extend RUN [FOLDER] --epochs N

  FOLDER               images: nested, flat or class-per-folder; or a list (.txt, .csv), tar or Parquet shards, a .npz
  --resume RUN         continue the run in this folder, or of this name in OUT, with its options; FOLDER: if its images
                       were moved
  --resume auto        continue OUT/NAME, or without a name the newest unfinished run with these options, else start it
  --extend RUN         go on after the end of this run, in a new folder; N: the total of both

`byol-fast train RECIPE --help` shows the recipe's values, too.

recipes:
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    start = time.monotonic()
    resume, argv = take_run("--resume", argv)
    extend, argv = take_run("--extend", argv)
    if resume is not None and extend is not None:
        raise ConfigError("byol-fast train: --extend must not be given beside --resume, it begins a new run; drop one")
    run_word = resume if resume != "auto" else None
    continues_run = run_word is not None or extend is not None
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if continues_run and name is not None and name not in recipes.RECIPES and Path(name).exists():
        argv, name = [name, *argv], None  # of a run the recipe is known: the word is FOLDER
    if name is None and not continues_run:
        return _print_usage(argv)
    folder: Path | None = None
    if extend is not None:
        extended = run_folder(extend, argv)
        has_total = is_given("--epochs", argv) or is_given("--steps", argv)
        config = _config_of_run(extended, extend_config(extended, has_total=has_total), name, argv, "extend")
    elif run_word is not None:
        folder = run_folder(run_word, argv)
        config = _config_of_run(folder, configs.load(folder / "config.json"), name, argv, "resume")
    else:
        assert name is not None
        config = parse_config(find_recipe(name, "byol-fast train"), argv, f"byol-fast train {name}")

    run = find_resumable(config) if resume == "auto" else folder
    if run is not None and (complete := result_without_checkpoints(run, config)) is not None:
        return _print_complete(complete, config)
    if is_first_process():  # it checks for all
        check_start(config, resume=run)

    from byol_fast.profiling.page import run_sections
    from byol_fast.report.callback import ReportCallback
    from byol_fast.training import distributed  # imports torch: after parsing, so that errors are instant
    from byol_fast.training.trainer import Trainer

    # Already here, because the processes must agree on the run to resume; the trainer's call then finds the group.
    world = distributed.init_process_group(config.device, config.timeout_minutes)
    try:
        if resume == "auto":
            folder = world.run_on_main(lambda: find_resumable(config))
        trainer = Trainer(config, resume=folder, callbacks=[ReportCallback(run_sections)])
        first_step = trainer.state.step
        result = trainer.fit()
    finally:
        distributed.destroy_process_group()
    # Rank 0 alone: torchrun ends all processes at the first that fails, also one that still writes the report.
    if not world.is_main_process:
        return 0
    seconds = None if first_step >= trainer.total_steps else time.monotonic() - start
    return print_end(result, trainer.config, seconds=seconds, first_step=first_step)


def _print_complete(result: RunResult, config: Config) -> int:
    """Print the end of a run that is complete and whose checkpoints were deleted; return the exit code."""
    if not is_first_process():
        return 0
    if result.problem is not None:
        log.warning("%s: %s", short_path(result.run_dir), result.problem)
    return print_end(result, config, seconds=None)


def _print_usage(argv: list[str]) -> int:
    """Print the usage and all recipes; return the exit code of a command without a recipe."""
    print(USAGE, end="")
    for recipe, make in recipes.RECIPES.items():
        print(f"  {recipe:24s}{summary(make)}")
    if argv and argv[0] in {"-h", "--help"}:
        options = help_text(RunOptions, "byol-fast train RECIPE", first=FREQUENT, show_defaults=False)
        print(options[options.index("\n\n") + 1 :], end="")
        return 0
    misplaced = [word for word in argv if word in recipes.RECIPES]
    hint = f"; it comes first: byol-fast train {misplaced[0]} ..." if misplaced else ""
    return print_error(f"byol-fast train: a recipe is missing{hint}", 2)


def _config_of_run(run: Path, stored: Config, name: str | None, argv: list[str], command: str) -> Config:
    """The configuration of a run with the options of its continuation.

    Args:
        run: its folder.
        stored: its configuration.
        name: first word behind the command, if it is no option and no folder.
        argv: the words behind it.
        command: "resume" or "extend".
    """
    if name is not None and name not in recipes.RECIPES:
        raise ConfigError(f"byol-fast train: {name} is neither a recipe nor an existing folder; check the spelling")
    if name not in {None, stored.recipe}:
        raise ConfigError(f"{command}: {run} is a run of {stored.recipe!r}, got recipe {name!r}; leave the recipe out")
    return parse_config(stored, argv, f"byol-fast train --{command} {short_path(run)}")


def take_run(option: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Value of `--resume` or `--extend`, or None, and the remaining arguments."""
    rest: list[str] = []
    run = None
    words = iter(argv)
    for word in words:
        if word == option or word.startswith(f"{option}="):
            run = word.partition("=")[2] or next(words, "")
            if not run or run.startswith("-"):
                or_auto = " or 'auto'" if option == "--resume" else ""
                raise ConfigError(f"byol-fast train: {option} must be followed by a run folder{or_auto}")
        else:
            rest.append(word)
    return run, rest


def run_folder(run: str, argv: Sequence[str]) -> Path:
    """The folder that `--resume` or `--extend` names: its path, or the name of a run in the folder of `--out`."""
    out, path = expand_home(last_value("--out", argv) or Config().out), expand_home(run)
    is_run = (path / "config.json").exists()  # a folder of images may have the same name
    return out / run if not is_run and (out / run).is_dir() else path


def summary(make: Callable[[], Config]) -> str:
    """First line of a recipe's docstring, or a summary of its configuration."""
    if make.__doc__:
        return make.__doc__.splitlines()[0]
    config = make()
    return f"{config.model.encoder}, {config.epochs} epochs, base lr {config.optim.lr}, tau {config.tau.base}"
