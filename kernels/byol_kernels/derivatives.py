"""Derivatives of the operators beyond the backward pass: an error where torch would return zeros.

An operator of `torch.library` can define its backward pass, but no forward-mode derivative: torch drops the tangents of
its inputs without a word. The operators are therefore registered for autograd here, by kernels that look for tangents
first. `torch.func.grad` needs a rule that such an operator cannot define either. Public functions that have a
derivative use plain PyTorch where `is_transformed` says so.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NAMESPACE = "byol_kernels"


def is_transformed() -> bool:
    """True within `torch.func.grad`, `jvp`, `vmap` and the like, and within forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op_name: str) -> None:
    """Raise a NotImplementedError where `is_transformed`: for updates in place of lists of tensors.

    Args:
        op_name: the function that messages name.
    """
    if is_transformed():
        raise NotImplementedError(
            f"{op_name}: an update in place must be outside of torch.func and of forward-mode differentiation, got a "
            "call within; call it afterwards"
        )


def register_autograd(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
) -> None:
    """`torch.library.register_autograd` for an operator of this package, which then refuses other derivatives.

    Args:
        name: of the operator.
        backward: see `torch.library.register_autograd`.
        setup_context: likewise.
    """
    torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def refuse_derivatives(name: str) -> None:
    """Let an operator that writes in place refuse tensors that a derivative is asked for.

    Args:
        name: of the operator.
    """
    op = getattr(torch.ops.byol_kernels, name).default

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(_message(name, "that require a gradient"))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, run, "Autograd", with_keyset=True)


class _Library(torch.library.Library):
    """A library whose kernels for autograd refuse tangents, and tensors of `torch.func.grad`."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        """Register a kernel that takes a keyset."""
        name = str(op_name)

        def kernel(keyset: Any, *args: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, _tensors(args))):
                raise NotImplementedError(_message(name, "with a forward-mode tangent"))
            if torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*args):
                raise NotImplementedError(_message(name, "of a torch.func transform that takes a gradient"))
            return fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)  # type: ignore[no-untyped-call]


_library = _Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments of an operator, which may be lists."""
    members = [member for a in args for member in (a if isinstance(a, list | tuple) else (a,))]
    return [member for member in members if isinstance(member, Tensor)]


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _message(name: str, tensors: str) -> str:
    return (
        f"{_NAMESPACE}::{name}: arguments must have no derivative of this kind, got tensors {tensors}; detach them, or "
        "write the operation in plain PyTorch"
    )
