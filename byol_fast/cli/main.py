"""The command line: `byol-fast COMMAND`, also `python -m byol_fast COMMAND`."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from byol_fast import __version__
from byol_fast.cli.options import complain
from byol_fast.config import ConfigError

USAGE = f"""\
byol-fast {__version__}: fast, correct BYOL pre-training

usage: byol-fast COMMAND ...

  demo                            learn from packaged images in a few minutes; start here
  train RECIPE [--option ...]     pre-train an encoder; `train --help` lists recipes, `train RECIPE --help` options
  train --resume RUN              continue a run exactly where it stopped
  preview RECIPE [--check]        a contact sheet of the views that training sees; a check against torchvision
  doctor [--data.root FOLDER]     check this machine, and every image; say what to do about what is wrong
  export RUN [--format ...]       write the encoder of a run's newest checkpoint: safetensors, ONNX, torch.export, timm
  eval PROTOCOL ENCODER           judge an encoder with labels: knn, linear or finetune; `eval --help` says more
  embed RUN FOLDER                write the features of every image, and a sheet of nearest neighbors
  report RUN [RUN ...]            one HTML page about a run: curves, evaluations, views, neighbors; or several compared
  bench [SUITE ...]               measure this beside what else one could use; `bench compare A B`: what has changed
  profile RECIPE | --resume RUN   where the time of a run's steps goes, and what to change
  roofline RECIPE [--gpu H100]    how fast a step could be at most, on GPUs one need not have
  --version                       print the version
"""

# Each is a module of `byol_fast.cli`, imported when it is asked for.
COMMANDS = ("demo", "train", "preview", "doctor", "export", "eval", "embed", "report", "bench", "profile", "roofline")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the run failed, 2 the command is wrong, 128 + signal when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LogLines()])
    # Until training takes signals over, Ctrl-C ends the process plainly: an exception in the middle of importing torch
    # would come out as a long traceback, or be swallowed.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


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
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(COMMANDS)}"
        return complain(f"byol-fast: unknown command {argv[0]!r}; {hint}", 2)
    try:
        code: int = importlib.import_module(f"byol_fast.cli.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:
        return complain("stopped at once, without saving; what was saved before is intact", 130)
    except ConfigError as error:
        return complain(str(error), 2)
    except Exception as error:
        return _explain(error)
    return code


def _explain(error: Exception) -> int:
    """Show an error the user can act on without its traceback; let any other one through."""
    from byol_fast.data import CorruptImageError
    from byol_fast.training.distributed import MainProcessError
    from byol_fast.training.errors import Interrupted, TrainingError
    from byol_fast.utils.checkpoint import CheckpointError

    if isinstance(error, MainProcessError):
        return 1  # the leader has told it
    if isinstance(error, Interrupted):
        return complain(str(error), 128 + error.signum)
    expected = CheckpointError | TrainingError | CorruptImageError | ValueError | FileNotFoundError
    if not isinstance(error, expected) or os.environ.get("BYOL_FAST_TRACEBACK"):
        raise error
    wrong_input = isinstance(error, ValueError | FileNotFoundError) and not isinstance(error, CorruptImageError)
    where = "\n(BYOL_FAST_TRACEBACK=1 shows where)" if type(error) is ValueError else ""
    return complain(f"{error}{where}", 2 if wrong_input else 1)
