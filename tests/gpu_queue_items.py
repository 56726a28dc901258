"""Items that tests/test_gpu_queue.py has the queue run: small ones, some of which do what must not stop the others."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.item import START_SECONDS, Context, Item

FOLDER = Path(os.environ.get("GPU_QUEUE_TEST_FOLDER", "/nonexistent"))
"""Where a test keeps the files that items depend on, and items leave what the test looks for."""


def fake(name: str, *, seconds: float = START_SECONDS + 1, **rest: Any) -> Item:
    """An item whose function has its name, and that depends on a file of its name."""
    question = f"what does {name} do?"
    depends_on = (str(FOLDER / name),)
    return Item(name=name, question=question, run=f"{__name__}:{name}", seconds=seconds, depends_on=depends_on, **rest)


def quick(context: Context) -> None:
    import torch

    context.record("process", pid=os.getpid(), dtype=str(torch.get_default_dtype()), flags=flags())
    (context.folder / "notes.txt").write_text("a file of the result")


def flags() -> list[bool]:
    import torch

    cudnn = torch.backends.cudnn
    return [torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.is_grad_enabled()]


def careless(context: Context) -> None:
    """Leaves every flag changed."""
    import torch

    quick(context)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.set_grad_enabled(False)


second = third = later = last = quick


def many(context: Context) -> None:
    for number in range(400):
        context.record(f"figure {number}", milliseconds=number / 7, note="as long as a line of text may well become")


def raises(context: Context) -> None:
    context.record("before", value=1)
    raise ValueError("the reason that it gives")


def crashes(_context: Context) -> None:
    ctypes.string_at(0)


def hangs(context: Context) -> None:
    """Starts a process of another session, and waits for ever."""
    started = subprocess.Popen(["sleep", "300"], start_new_session=True)
    context.record("processes", pids=[os.getpid(), started.pid])
    (FOLDER / "hangs.begun").touch()
    time.sleep(300)


def slow(context: Context) -> str | None:
    """Records as it goes, and is slow as long as it finds a file that says so."""
    context.record("first", left=context.seconds_left())
    if (FOLDER / "be.slow").exists():
        time.sleep(300)
    context.record("second", left=context.seconds_left())
    return None


def cut_short(context: Context) -> str:
    context.record("only", value=1)
    return "no time for the rest"


ITEMS = (
    fake("careless"),
    fake("second"),
    fake("raises"),
    fake("third"),
    fake("crashes"),
    fake("cut_short"),
    fake("many"),
    fake("long_one", seconds=START_SECONDS + 1e5),
    fake("quick"),
    fake("slow", seconds=START_SECONDS + 1e5, first_figure=START_SECONDS + 1),
    fake("later"),
    fake("hangs", seconds=0.5, own_process=True),
    fake("last"),
    fake("no_program", programs=("no-such-program",)),
    fake("no_file", files=(".gpu/no-such-file",)),
    fake("no_package", modules=("nvidia.no_such_package",)),
    fake("gpu_only", not_rehearsed="a CPU has no power limit"),
)
