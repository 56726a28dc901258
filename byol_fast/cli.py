"""The command line: `byol-fast COMMAND`, also `python -m byol_fast COMMAND`."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from byol_fast import __version__, recipes
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError

if TYPE_CHECKING:
    from byol_fast.trainer import RunResult

USAGE = f"""\
byol-fast {__version__}: fast, correct BYOL pre-training

usage: byol-fast COMMAND ...

  demo                            learn from packaged images in a few minutes; start here
  train RECIPE [--option ...]     pre-train an encoder; `train --help` lists recipes, `train RECIPE --help` options
  train --resume RUN              continue a run exactly where it stopped
  preview RECIPE [--check]        a contact sheet of the views that training sees; a check against torchvision
  doctor [--data.root FOLDER]     check this machine, and every image; say what to do about what is wrong
  export RUN [--to FOLDER]        write the encoder of a run's newest checkpoint
  --version                       print the version
"""

TRAIN_USAGE = """\
usage: byol-fast train RECIPE [--data.root FOLDER] [--option value ...]
       byol-fast train --resume RUN
       byol-fast train RECIPE --resume auto [--option value ...]

  --data.root FOLDER   images: nested, flat or class-per-folder; or a list (.txt, .csv), tar or Parquet shards, a .npz
  --resume RUN         continue the run in this folder, with its own options
  --resume auto        continue OUT/NAME, or without a name the newest unfinished run like this; if none, start it

`byol-fast train RECIPE --help` lists every option with the recipe's value.

recipes:
"""


PREVIEW_USAGE = """\
usage: byol-fast preview RECIPE [--data.root FOLDER] [--num N] [--to FILE.png] [--epoch E] [--check] [--option ...]

Draws originals, both views as training would see them, and their parameters, into preview.png. With --check it also
compares every operator with torchvision on your images, and exits with 1 where the error is too large.
`byol-fast preview RECIPE --help` lists every option with the recipe's value.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the run failed, 2 the command is wrong, 128 + signal when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LogLines()])
    # Until training takes signals over, Ctrl-C ends the process plainly: an exception in the middle of importing torch
    # would come out as a long traceback, or be swallowed.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


class _LogLines(logging.Handler):
    """Log records as lines on standard error, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        Console(stderr=True, highlight=False).print(self.format(record), soft_wrap=True, markup=False, style=style)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(COMMANDS)}"
        return _complain(f"byol-fast: unknown command {argv[0]!r}; {hint}", 2)
    try:
        return command(argv[1:])
    except KeyboardInterrupt:
        return _complain("stopped at once, without saving; what was saved before is intact", 130)
    except ConfigError as error:
        return _complain(str(error), 2)
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Show an error the user can act on without its traceback; let any other one through."""
    from byol_fast.checkpoint import CheckpointError
    from byol_fast.data import BadImageError
    from byol_fast.distributed import LeaderError
    from byol_fast.trainer import Interrupted, TrainingError

    if isinstance(error, LeaderError):
        return 1  # the leader has told it
    if isinstance(error, Interrupted):
        return _complain(str(error), 128 + error.signum)
    expected = CheckpointError | TrainingError | BadImageError | ValueError | FileNotFoundError
    if not isinstance(error, expected) or os.environ.get("BYOL_FAST_TRACEBACK"):
        raise error
    wrong_input = isinstance(error, ValueError | FileNotFoundError) and not isinstance(error, BadImageError)
    where = "\n(BYOL_FAST_TRACEBACK=1 shows where)" if type(error) is ValueError else ""
    return _complain(f"{error}{where}", 2 if wrong_input else 1)


def _complain(message: str, code: int) -> int:
    Console(stderr=True, highlight=False).print(message, soft_wrap=True, markup=False, style="red")
    return code


# ------------------------------------------------------------------ commands


def _train(argv: list[str]) -> int:
    resume, argv = _take_resume(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None and (resume is None or resume == "auto"):
        print(TRAIN_USAGE, end="")
        for recipe, make in recipes.RECIPES.items():
            print(f"  {recipe:24s}{_summary(make)}")
        if argv and argv[0] in {"-h", "--help"}:
            return 0
        named = [word for word in argv if word in recipes.RECIPES]
        hint = f"; it comes first: byol-fast train {named[0]} ..." if named else ""
        return _complain(f"byol-fast train: a recipe is missing{hint}", 2)
    if name is not None and Path(name).exists() and name not in recipes.RECIPES:
        raise ConfigError(f"byol-fast train: {name} is no recipe; images are given as --data.root {name}")

    folder: Path | None = None
    if resume is None or resume == "auto":
        assert name is not None
        config = _parse(recipes.get(name), argv, f"byol-fast train {name}")
    else:
        folder = Path(resume)
        stored = configs.load(folder / "config.json")
        if name not in {None, stored.recipe}:
            raise ConfigError(
                f"resume: {folder} is a run of {stored.recipe!r}, got recipe {name!r}; leave the recipe out"
            )
        config = _parse(stored, argv, f"byol-fast train --resume {resume}")

    from byol_fast import distributed  # torch takes seconds to import: only once the options are right
    from byol_fast.api import find_resumable
    from byol_fast.trainer import Trainer

    world = distributed.join(config.device, config.timeout_minutes)
    try:
        if resume == "auto":
            folder = world.from_leader(lambda: find_resumable(config))
        result = Trainer(config, resume=folder).fit()
    finally:
        distributed.leave()
    if world.leads:
        _summarise(result)
    return 0


def _demo(argv: list[str]) -> int:
    config = _parse(recipes.demo(), argv, "byol-fast demo")

    from byol_fast.trainer import Trainer, resolve_device

    if resolve_device(config.device).type == "cuda" and not {"--epochs", "--steps"} & set(argv):
        config = configs.replace(config, {"epochs": recipes.DEMO_GPU_EPOCHS})
    began = time.monotonic()
    result = Trainer(config).fit()
    table = Table(title="Fashion-MNIST, 10 classes: nearest-neighbour accuracy of the features")
    table.add_column("encoder")
    table.add_column(f"kNN-{config.knn.k} top-1", justify="right")
    if result.knn_top1 is not None and result.knn_top1_untrained is not None:
        table.add_row("untrained (norms calibrated)", f"{result.knn_top1_untrained:.1%}")
        table.add_row("after BYOL, without labels", f"{result.knn_top1:.1%}")
        gain = round(100 * result.knn_top1, 1) - round(100 * result.knn_top1_untrained, 1)
        table.add_row("gain", f"{gain:+.1f} points")
    Console().print(table)
    print(f"{result.steps} steps in {time.monotonic() - began:.0f} s, evaluations included")
    _summarise(result)
    program = Path(sys.executable).with_name("byol-fast")
    print(
        f"next, on your own images, with a GPU:\n  {program} train imagenet_resnet50_100 --data.root FOLDER\n"
        f"or small, on a CPU:\n  {program} train imagenet_resnet50_100 --data.root FOLDER --model.encoder resnet18 "
        "--view1.size 64 --view2.size 64 --batch-size 64 --epochs 20"
    )
    return 0


def _export(argv: list[str]) -> int:
    def export(run: tyro.conf.Positional[Path], to: Path | None = None) -> None:
        """Write the online encoder of a run's newest checkpoint.

        Args:
            run: the run folder.
            to: where to write encoder.safetensors and encoder.json; the run folder by default.
        """
        from byol_fast.export import export_run

        for path in export_run(run, to):
            print(path)

    tyro.cli(export, args=argv, prog="byol-fast export")
    return 0


def _preview(argv: list[str]) -> int:
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None:
        print(PREVIEW_USAGE, end="")
        return 0 if argv and argv[0] in {"-h", "--help"} else _complain("byol-fast preview: a recipe is missing", 2)
    recipe = recipes.get(name)

    def options(
        config: Annotated[Config, tyro.conf.arg(name="")] = recipe,
        num: int = 8,
        to: Path = Path("preview.png"),
        epoch: int = 0,
        check: bool = False,
        check_all: bool = False,
    ) -> tuple[Config, int, Path, int, bool, bool]:
        """Draw a contact sheet of the views that training sees.

        Args:
            config: of the run.
            num: images on the sheet: the first ones of the epoch.
            to: the PNG file to write.
            epoch: pass over the data, from 0; each has its own views.
            check: compare every operator with torchvision on these images, and exit with 1 if an error is too large.
            check_all: the same for every loader that works here, not only for the run's own.
        """
        return config, num, to, epoch, check, check_all

    config, num, to, epoch, check, check_all = tyro.cli(options, args=argv, prog=f"byol-fast preview {name}")

    from byol_fast.data import parity, preview, split
    from byol_fast.trainer import resolve_device

    preview.check_path(to)
    device = resolve_device(config.device)
    source, _ = split(configs.replace(config, {"knn.enabled": "off"}))
    preview.write(preview.contact_sheet(source, config, device=device, num=num, epoch=epoch), to)
    print(to)
    if not check and not check_all:
        return 0
    backends = parity.backends(source, config, device) if check_all else [parity.Backend(source, config, device)]
    return 0 if parity.show(parity.measure(source, config, backends)) else 1


def _doctor(argv: list[str]) -> int:
    from byol_fast.doctor import Options, examine

    return examine(tyro.cli(Options, args=argv, prog="byol-fast doctor"))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "preview": _preview,
    "doctor": _doctor,
    "export": _export,
}


# ------------------------------------------------------------------ pieces


def _take_resume(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--resume X` off; the rest belongs to the configuration."""
    rest: list[str] = []
    resume = None
    words = iter(argv)
    for word in words:
        if word == "--resume" or word.startswith("--resume="):
            resume = word.partition("=")[2] or next(words, "")
            if not resume or resume.startswith("-"):
                raise ConfigError("byol-fast train: --resume must be followed by a run folder or 'auto'")
        else:
            rest.append(word)
    return resume, rest


def _parse(config: Config, argv: list[str], prog: str) -> Config:
    """Override single fields of a configuration from the command line."""
    return tyro.cli(Config, default=config, args=argv, prog=prog, description=f"Options of `{prog}`.")


def _summary(make: Callable[[], Config]) -> str:
    """First line of a recipe's docstring; what is known of one without."""
    if make.__doc__:
        return make.__doc__.splitlines()[0]
    config = make()
    return f"{config.model.encoder}, {config.epochs} epochs, base lr {config.optim.lr}, tau {config.tau.base}"


def _summarise(result: RunResult) -> None:
    print(f"encoder: {result.encoder}\nmetrics: {result.run_dir / 'metrics.jsonl'}\nrun folder: {result.run_dir}")
