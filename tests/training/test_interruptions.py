"""Runs whose terminal, pipe or disk for output goes away, and runs that a signal stops, in processes of their own."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess

import pytest

from byol_fast import Callback
from byol_fast import config as configs
from byol_fast.config import Config, recipes
from byol_fast.training.metrics_file import read
from byol_fast.training.train_step import StepOutput
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from tests.training.helpers import FORK_SERVER, SMALL_RUN, use_small_encoder

STEPS, LAST = 6, 4
TERMINAL = 100
"""A descriptor of the terminal that the run does not know."""


@pytest.fixture
def small(tiny: Config) -> Config:
    """A run of a tenth of a second that saves at its end only."""
    return configs.replace(tiny, SMALL_RUN | {"checkpoint_every": 100, "steps": STEPS})


def lose_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    redirect(writer)


def fill_disk() -> None:
    redirect(os.open("/dev/full", os.O_WRONLY))


def open_terminal(path: str) -> None:
    """Make a terminal the controlling one: its end is a SIGHUP."""
    os.setsid()
    redirect(os.open(path, os.O_RDWR))
    os.dup2(1, TERMINAL)
    os.environ["TERM"] = "xterm"


def wait_for_the_end_of_the_terminal() -> None:
    os.write(TERMINAL, b"waiting")
    poll = select.poll()
    poll.register(TERMINAL, select.POLLHUP)
    poll.poll(100_000)


def redirect(descriptor: int) -> None:
    for number in (1, 2):
        os.dup2(descriptor, number)


class AtStep(Callback):
    """Prints in each step, and calls a function in step LAST."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        print(trainer.state.step, file=sys.stdout if trainer.state.step % 2 else sys.stderr, flush=True)
        if trainer.state.step == LAST:
            self.act()


def prepare(lose: Callable[[], None], ignored: Sequence[int] = ()) -> None:
    """Set up the new process."""
    use_small_encoder()
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)
    lose()


def train(
    config: Config,
    lose: Callable[[], None],
    act: Callable[[], object] = int,
    ignored: Sequence[int] = (),
    environ: Mapping[str, str] | None = None,
) -> None:
    """`byol-fast train` that loses its output at the start or by `act`, in its step LAST."""
    from byol_fast.cli import main
    from byol_fast.report import callback

    prepare(lose, ignored)
    os.environ.update(environ or {})
    recipes.RECIPES["spec"] = lambda: config
    callback.ReportCallback = lambda _: AtStep(act)  # type: ignore[assignment, misc]  # a report takes seconds
    main.main(["train", "spec"])


def pretrain(config: Config, lose: Callable[[], None]) -> None:
    """`byol_fast.pretrain` in a program whose callback prints; the program exits with 5 if the run has ended."""
    prepare(lose)
    steps = Trainer(config, callbacks=[AtStep(int)]).fit().steps
    sys.exit(5 if steps == STEPS else 1)


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = FORK_SERVER.Process(target=function, args=arguments)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int | None:
    process.join(100)
    process.kill()
    return process.exitcode


def saved_step(config: Config) -> int:
    """Step of the newest checkpoint, up to which there are all records."""
    run = config.out / config.name
    step = checkpoints.use_latest(run / "checkpoints", checkpoints.load)["step"]
    assert [record["step"] for record in read(run / "metrics.jsonl")] == list(range(1, step + 1))
    return int(step)


@pytest.mark.parametrize("lose", [lose_pipe, fill_disk])
def test_run_without_output_goes_on_to_its_end(small: Config, lose: Callable[[], None]) -> None:
    assert exit_code(start(train, small, lose)) == 0
    assert saved_step(small) == STEPS
    assert (small.out / "tiny" / "encoder.safetensors").exists()


def test_run_in_a_program_without_output_goes_on_to_its_end(small: Config) -> None:
    assert exit_code(start(pretrain, small, lose_pipe)) == 5
    assert saved_step(small) == STEPS


@pytest.mark.parametrize(("ignored", "code", "steps"), [((), 129, range(LAST, STEPS)), ((signal.SIGHUP,), 0, [STEPS])])
def test_closed_terminal_saves_or_goes_on(
    small: Config, ignored: Sequence[int], code: int, steps: Sequence[int]
) -> None:
    terminal, other_end = os.openpty()
    lose = partial(open_terminal, os.ttyname(other_end))
    process = start(train, small, lose, wait_for_the_end_of_the_terminal, ignored)
    output = b""
    while b"waiting" not in output:
        assert select.select([terminal], [], [], 100)[0]
        output += os.read(terminal, 1000)
    os.close(other_end)
    os.close(terminal)
    assert exit_code(process) == code
    assert saved_step(small) in steps


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_ends_run_without_output(small: Config, signum: signal.Signals) -> None:
    assert exit_code(start(train, small, lose_pipe, partial(signal.raise_signal, signum))) == 128 + signum
    assert saved_step(small) == LAST
    assert not (small.out / "tiny" / "encoder.safetensors").exists()


def test_signal_to_one_of_two_processes_saves_and_ends_both(small: Config) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    acts = (int, partial(signal.raise_signal, signal.SIGHUP))
    processes = [
        start(train, small, lose_pipe, act, (), {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, act in enumerate(acts)
    ]
    assert [exit_code(process) for process in processes] == [129, 129]
    assert saved_step(small) == LAST
