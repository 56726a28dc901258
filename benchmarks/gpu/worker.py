"""Worker process of the queue: runs items one after the other and restores the state of torch after each."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu.item import Context, Item
from benchmarks.gpu.process import MARK, kill_descendants
from byol_fast.utils import env

GIB = 2**30
MAX_LEFTOVER_BYTES = GIB
"""GPU memory that an item may leave allocated; beyond it the next item gets a new process."""


def main() -> None:
    """Answer the requests of the queue until it closes the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", required=True)
    parser.add_argument("--replies", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    faulthandler.enable(all_threads=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.set_inheritable(options.replies, False)
    replies = os.fdopen(options.replies, "w", buffering=1)
    requests = _requests()
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        _reply(replies, error="no CUDA device; REHEARSE=1 (--rehearse) runs the queue on the CPU")
        return
    items: dict[str, Item] = {item.name: item for item in importlib.import_module(options.items).ITEMS}
    environment = env.describe_measurement(torch.device(device))
    _reply(replies, environment=environment, free_gib=_free_gib(device))
    reset = _torch_state()
    while True:
        request = requests.get()
        with _output_to(Path(request["folder"]) / "log.txt"):
            reply = _answer(items[request["item"]], request, device, reset)
        _reply(replies, **reply, free_gib=_free_gib(device) if reply["usable"] else None)


def _requests() -> queue.SimpleQueue[dict[str, Any]]:
    """Queue of incoming requests. When the parent process ends, this process and its descendants end at once."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    source = os.fdopen(os.dup(0))  # items get an empty standard input
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def read() -> None:
        for line in source:
            waiting.put(json.loads(line))
        kill_descendants(os.environ.get(MARK, ""))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return waiting


def _reply(replies: TextIO, **values: Any) -> None:
    replies.write(json.dumps(values) + "\n")
    replies.flush()


def _answer(item: Item, request: dict[str, Any], device: str, reset: Callable[[], None]) -> dict[str, Any]:
    """Run an item and clean up; return its status, the reason, and True if this process can run another item."""
    context = Context(
        item,
        Path(request["records"]),
        Path(request["folder"]),
        device=device,
        rehearsal=device == "cpu",
        deadline=request["deadline"],
    )
    status, reason = "complete", ""
    try:
        module, _, name = item.run.partition(":")
        missing = getattr(importlib.import_module(module), name)(context)
        if device == "cuda":
            torch.cuda.synchronize()  # raises errors of the kernels of this item
        if missing is not None:
            status, reason = "partial", str(missing)
    except BaseException as error:
        traceback.print_exc()
        inside = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without this function
        lines = "".join(traceback.format_exception(type(error), error, inside, limit=-4)).splitlines()
        reason = "\n".join(line for line in lines if line.strip(" ^~"))[-3000:]
        status = "failed"
    return {"status": status, "reason": reason, "usable": _clean(device, reset)}


def _clean(device: str, reset: Callable[[], None]) -> bool:
    """Free memory and restore the state of torch; True if the next item may run in this process."""
    try:
        reset()
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()
        gc.collect()
        if device == "cpu":
            return True
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.ones(1, device=device).add_(1).cpu()  # raises if an error has ended the CUDA context
        return torch.cuda.memory_reserved() <= MAX_LEFTOVER_BYTES
    except Exception:
        traceback.print_exc()
        return False


def _torch_state() -> Callable[[], None]:
    """Function that restores the current flags, default dtype and threads of torch."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags: list[tuple[Any, str]] = [(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")]
    reductions = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    flags += [(matmul, name) for name in (*reductions, "allow_tf32")]
    values = [(owner, name, getattr(owner, name)) for owner, name in flags]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = _deterministic()

    def reset() -> None:
        for owner, name, value in values:
            setattr(owner, name, value)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_num_threads(threads)
        if _deterministic() != deterministic:  # the call imports inductor, which takes seconds
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.set_grad_enabled(True)

    return reset


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _free_gib(device: str) -> float | None:
    return torch.cuda.mem_get_info()[0] / GIB if device == "cuda" else None


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirect the output of the block, including that of child processes, to a file."""
    before = [os.dup(1), os.dup(2)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        _redirect(file, file)
        yield
    finally:
        _redirect(*before)
        for descriptor in (*before, file):
            os.close(descriptor)


def _redirect(output: int, errors: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):  # an item may have closed it
            stream.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)


if __name__ == "__main__":
    main()
