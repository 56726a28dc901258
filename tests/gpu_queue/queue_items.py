"""Small items for tests/gpu_queue/test_queue.py; some of them crash, raise or hang."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.item import START_SECONDS, Context, Item

FOLDER = Path(os.environ.get("GPU_QUEUE_TEST_FOLDER", "/nonexistent"))
"""Folder of a test: holds the files that items depend on, and markers that items write."""


def build_item(name: str, *, seconds: float = START_SECONDS + 1, **rest: Any) -> Item:
    """Item whose function and dependency have its name."""
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
    """Change every flag."""
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
        context.record(f"figure {number}", milliseconds=number / 7, note="a text of some length, as in real figures")


def raises(context: Context) -> None:
    context.record("before", value=1)
    raise ValueError("the reason of the error")


def crashes(_context: Context) -> None:
    ctypes.string_at(0)


def hangs(context: Context) -> None:
    """Start a process in another session and wait."""
    started = subprocess.Popen(["sleep", "300"], start_new_session=True)
    context.record("processes", pids=[os.getpid(), started.pid])
    (FOLDER / "hangs.started").touch()
    time.sleep(300)


def slow(context: Context) -> str | None:
    """Record two figures; wait between them while the file `be.slow` exists."""
    context.record("first", left=context.seconds_left())
    if (FOLDER / "be.slow").exists():
        time.sleep(300)
    context.record("second", left=context.seconds_left())
    return None


def cut_short(context: Context) -> str:
    context.record("only", value=1)
    return "no time for the rest"


ITEMS = (
    build_item("careless"),
    build_item("second"),
    build_item("raises"),
    build_item("third"),
    build_item("crashes"),
    build_item("cut_short"),
    build_item("many"),
    build_item("long_one", seconds=START_SECONDS + 1e5),
    build_item("quick"),
    build_item("slow", seconds=START_SECONDS + 1e5, first_figure=START_SECONDS + 1),
    build_item("later"),
    build_item("hangs", seconds=0.5, own_process=True),
    build_item("last"),
    build_item("no_program", programs=("no-such-program",)),
    build_item("no_file", files=(".gpu/no-such-file",)),
    build_item("no_package", modules=("nvidia.no_such_package",)),
    build_item("gpu_only", not_rehearsed="a CPU has no power limit"),
)
