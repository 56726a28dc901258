"""Operators that a training step calls on its state, with their dtypes: recorded on the CPU and on CUDA alike.

The state of a step: parameters and their low-precision copies, gradients, optimizer state, and buffers. A call is
noted as `operator: dtypes`. The operator is named without its overload. The dtypes are those of its arguments that are
state, or share memory with state, in the order of the arguments; a list of tensors counts as one argument and has the
dtypes of its members, joined by `|`. Arguments that are no state (activations, scalars) are left out. Views are not
noted: they start no kernel.

A dispatch mode sees the operators above the back ends: `aten::convolution`, and not the cuDNN or oneDNN operator below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.training.train_step import TrainStep

FILE = Path(__file__).parents[1] / "cuda_operators.json"
"""Calls that torch's CUDA dispatch accepted in a dry run; `make dry` writes it."""
NAMESPACES = ("aten::", "byol_kernels::")

Calls = dict[str, set[str]]
"""Dtypes that each operator was called with."""


class OperatorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that a training step calls on its state, each after it has succeeded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Calls = {}
        self._step: TrainStep | None = None
        self._parameters: dict[int, Tensor] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Without this torch runs a compiled function eagerly while a dispatch mode is active.
        return True

    def note_parameters(self, step: TrainStep) -> None:
        """Note what the networks of a step have as parameters now: in the forward pass they have the copies instead.

        Args:
            step: whose operators are recorded.
        """
        self._step = step
        self._parameters |= {id(p): p for p in step.model.parameters()}

    def _state(self) -> set[int]:
        """Where the state lies now: gradients come and go, the optimizer makes its state when it first needs it."""
        tensors = list(self._parameters.values())
        tensors += [p.grad for p in tensors if p.grad is not None]
        if self._step is not None:
            tensors += self._step.model.buffers()
            entries = self._step.optimizer.state.values()
            tensors += [t for entry in entries for t in entry.values() if isinstance(t, Tensor)]
        return _memory(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        dtypes = ""
        if name.startswith(NAMESPACES) and not func.is_view:
            state = self._state()
            dtypes = ", ".join(filter(None, (_dtypes(a, state) for a in (*args, *kwargs.values()))))
        result = func(*args, **kwargs)
        if dtypes:
            self.calls.setdefault(name, set()).add(dtypes)
        return result


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the tensors' storages."""
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def _dtypes(argument: object, state: set[int]) -> str:
    """Dtypes of an argument as far as it is state; empty if it is none."""
    members = argument if isinstance(argument, list | tuple) else [argument]
    tensors = [t for t in members if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in state]
    return "|".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def torch_version() -> str:
    """Version of torch, `major.minor`."""
    return ".".join(torch.__version__.split(".")[:2])


def read() -> tuple[str, Calls]:
    """The version of torch that the file was made with, and the calls in it."""
    content = json.loads(FILE.read_text())
    return content["torch"], {name: set(dtypes) for name, dtypes in content["operators"].items()}


def write(calls: Calls) -> None:
    """Write the file anew.

    Args:
        calls: that CUDA operators have executed.
    """
    operators = {name: sorted(calls[name]) for name in sorted(calls)}
    FILE.write_text(json.dumps({"torch": torch_version(), "operators": operators}, indent=1) + "\n")


def missing(calls: Calls, known: Calls) -> list[str]:
    """Calls that are not among the known ones, as `operator: dtypes`."""
    return [f"{name}: {d}" for name in sorted(calls) for d in sorted(calls[name] - known.get(name, set()))]
