"""The command line: `byol-fast COMMAND`, also `python -m byol_fast COMMAND`."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from byol_fast import __version__
from byol_fast.cli.options import print_error
from byol_fast.config import ConfigError
from byol_fast.config.fields import suggestion
from byol_fast.utils.commands import short_path
from byol_fast.utils.env import is_first_process
from byol_fast.utils.output import PlainConsole, ignore_output_errors
from byol_fast.utils.progress import Progress

USAGE = f"""\
byol-fast {__version__}: fast, correct BYOL pre-training

usage: byol-fast COMMAND ...

  demo                            train on packaged images in a few minutes; start here
  train RECIPE [FOLDER]           pre-train an encoder; `train --help` lists recipes, `train RECIPE --help` options
  train --resume RUN              continue a run exactly where it stopped
  preview RECIPE [--check]        write a contact sheet of augmented views; --check compares them with torchvision
  doctor [FOLDER]                 check your environment and data; suggests a fix for each problem
  export RUN [--format ...]       export the encoder of the newest checkpoint: safetensors, ONNX, torch.export, timm
  eval PROTOCOL ENCODER           evaluate an encoder with labels: knn, linear, finetune; see `eval --help`
  embed RUN FOLDER                write the features of every image; --neighbors adds a sheet of nearest neighbors
  report RUN [RUN ...]            write an HTML page: curves, evaluations, views, neighbors; several runs are compared
  bench [SUITE ...]               measure speed beside other libraries; `bench compare A B` compares two results
  bench cifar10 [RECIPE ...]      train on CIFAR-10: time to a kNN accuracy, beside published times
  profile RECIPE | --resume RUN   profile training steps: where the time goes, and which options to change
  roofline RECIPE [--gpu H100]    estimate the maximum speed of a step on a GPU, without having one
  --version                       print the version
"""

START = """\
byol-fast pre-trains image encoders without labels. To start:
  byol-fast demo                                        train on packaged images, in a few minutes
  byol-fast train imagenet_resnet50_100 path/to/images  train on your images
  byol-fast --help                                      list all commands
"""

# Each command is a module of `byol_fast.cli`, imported on use.
COMMANDS = ("demo", "train", "preview", "doctor", "export", "eval", "embed", "report", "bench", "profile", "roofline")
_WITH_PROGRESS = {"demo", "train", "preview", "doctor", "export", "eval", "embed", "report", "bench", "profile"}
_PROGRESS_ON_STDOUT = {"demo", "train", "eval"}
_WRONG_PATH = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""Errors of paths that the user gives; None: a message of our own about a missing file."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    The exit code is 0 after success, 1 if the run failed, 2 for wrong arguments, 3 if the run came to its end with an
    encoder of no use (`RunResult.problem`), 128 + signal when interrupted.
    """
    with ignore_output_errors():
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ConsoleHandler()])
        code = _run(list(sys.argv[1:] if argv is None else argv))
    sys.exit(code)


class _ConsoleHandler(logging.Handler):
    """Prints log records on standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        PlainConsole(stderr=True).print(self.format(record), soft_wrap=True, style=style)


def _run(argv: list[str]) -> int:
    if not argv:
        print(START, end="")
        return 2
    if argv[0] in {"-h", "--help", "help"}:
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        hint = suggestion(argv[0], COMMANDS) or f"commands are {', '.join(COMMANDS)}"
        return print_error(f"byol-fast: unknown command {argv[0]!r}; {hint}", 2)
    try:
        with _progress(argv[0]).shown(argv[0] if argv[0] in _WITH_PROGRESS else ""):
            code: int = importlib.import_module(f"byol_fast.cli.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:
        return print_error("stopped without saving; earlier checkpoints are intact", 130)
    except ConfigError as error:
        return print_error(str(error), 2)
    except Exception as error:
        return _explain(error)
    return code


def _progress(command: str) -> Progress:
    """Progress of a command: on standard output if it is the command's main output, otherwise on standard error.

    With several processes, only the first one shows it.
    """
    return Progress(PlainConsole(stderr=command not in _PROGRESS_ON_STDOUT) if is_first_process() else None)


def _explain(error: Exception) -> int:
    """Print an expected error without its traceback and return the exit code; re-raise any other error."""
    from byol_fast.data.errors import CorruptImageError
    from byol_fast.training.errors import Interrupted, MainProcessError, TrainingError
    from byol_fast.utils.errors import CheckpointError, first_line

    if isinstance(error, MainProcessError):
        return 1  # already printed by the main process
    if _is_out_of_memory(error):
        advice = "use smaller batches, views or networks, or fewer threads"
        return print_error(f"out of memory: {first_line(error)}; {advice}", 1)
    if isinstance(error, Interrupted):
        report = error.run_dir / "report.html"
        more = f"\nreport so far: {short_path(report)}" if report.exists() and not error.is_complete else ""
        return print_error(f"{error}{more}", 128 + error.signum)
    expected = CheckpointError | TrainingError | CorruptImageError | ValueError | OSError
    if not isinstance(error, expected) or os.environ.get("BYOL_FAST_TRACEBACK"):
        raise error
    wrong_input = isinstance(error, ValueError) and not isinstance(error, CorruptImageError)
    wrong_input |= isinstance(error, OSError) and error.errno in _WRONG_PATH
    is_foreign = type(error) is ValueError or (isinstance(error, OSError) and error.errno is not None)
    hint = "\n(set BYOL_FAST_TRACEBACK=1 for the traceback)" if is_foreign else ""
    return print_error(f"{error}{hint}", 2 if wrong_input else 1)


def _is_out_of_memory(error: Exception) -> bool:
    """True for memory or a thread that Python, torch (on a GPU, on a CPU) or the system could not get."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    reasons = ("out of memory", "can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)
    )
