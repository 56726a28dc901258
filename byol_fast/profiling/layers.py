"""Operations of a network and the values between them, recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.profiling.flops import attention_flops, forward_flops
from byol_fast.utils.errors import first_line

Kind = Literal[
    "conv", "matmul", "attention", "batch norm", "norm", "pointwise", "pool", "copy", "cat", "free", "unmodeled"
]
Saved = Literal["nothing", "output", "input", "others"]
"""Tensors that the derivative of a pointwise operation is computed from, besides the gradient."""


@dataclass(eq=False, slots=True)
class Value:
    """Content of a tensor's memory at one time; views of it are the same value."""

    numel: int
    width: int | None
    """Bytes per element; None for floating point, whose width is that of the run's precision."""
    is_vector: bool
    """All elements lie along one dimension: statistics, biases, gammas. Their traffic is not counted."""
    is_weight: bool
    needs_grad: bool
    producer: Op | None = None
    uses: list[Use] = field(default_factory=list)
    is_output: bool = False


@dataclass(eq=False, slots=True)
class Use:
    """Read access of an operation to a value: to all of it or, through a view, to a part."""

    value: Value
    numel: int
    op: Op


@dataclass(eq=False, slots=True)
class Op:
    """One operation of the forward pass."""

    name: str
    """Name in ATen without the overload, such as `"convolution"`."""
    kind: Kind
    saved: Saved
    layer: str
    """Dotted name of the innermost module."""
    inputs: list[Use]
    output: Value
    flops: int
    indices: int
    """Elements of a second output that is saved for the backward pass (positions of max-pooling)."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations of a forward pass, in order."""

    ops: list[Op]
    outputs: list[Value]

    def unmodeled(self) -> list[str]:
        """Names of operations of which only inputs and outputs are known."""
        return sorted({op.name for op in self.ops if op.kind == "unmodeled"})


_CONVS = {"convolution", "_convolution", "cudnn_convolution"}
_MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
_BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
    "_batch_norm_with_update", "native_group_norm",
}  # fmt: skip
_ROW_NORMS: dict[str, Saved] = {
    "native_layer_norm": "input", "_fused_rms_norm": "input", "_softmax": "output", "_safe_softmax": "output",
    "_log_softmax": "output",
}  # fmt: skip
_BY_SAVED: dict[Saved, tuple[str, ...]] = {
    "nothing": (
        "add", "sub", "neg", "rsub", "div.Scalar", "mul.Scalar", "masked_fill", "where", "fill", "zero", "bernoulli",
        "eq", "ne", "gt", "lt", "ge", "le", "logical_not", "bitwise_not", "expand_copy", "rand_like", "uniform",
    ),
    "output": (
        "relu", "hardtanh", "sigmoid", "tanh", "threshold", "leaky_relu", "elu", "exp", "sqrt", "rsqrt", "reciprocal",
    ),
    "input": (
        "gelu", "silu", "mish", "hardswish", "hardsigmoid", "softplus", "log", "pow", "abs", "sin", "cos", "erf",
        "clamp", "clamp_min", "clamp_max", "celu", "selu", "log_sigmoid_forward", "_prelu_kernel",
    ),
    "others": ("mul", "div", "addcmul", "lerp", "maximum", "minimum"),
}  # fmt: skip
_POINTWISE = {name: saved for saved, names in _BY_SAVED.items() for name in names}
_POOLS = {
    "max_pool2d_with_indices", "adaptive_max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "amax",
    "var_mean", "linalg_vector_norm", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
_COPIES = {
    "clone", "_to_copy", "copy", "roll", "constant_pad_nd", "index", "index_select", "gather", "flip", "im2col",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "repeat", "slice_scatter",
}  # fmt: skip
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "as_strided", "new_zeros", "zeros", "ones", "arange",
         "full", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_ones", "new_full", "linspace",
         "_local_scalar_dense", "lift_fresh"}  # fmt: skip


def _classify(name: str, overload: str) -> tuple[Kind, Saved]:
    if name in _CONVS:
        return "conv", "others"
    if name in _MATMULS:
        return "matmul", "others"
    if name in _BATCH_NORMS:
        return "batch norm", "input"
    if name in _ROW_NORMS:
        return "norm", _ROW_NORMS[name]
    saved = _POINTWISE.get(f"{name}.{overload}", _POINTWISE.get(name))
    if saved is not None:
        return "pointwise", saved
    for names, kind in ((_POOLS, "pool"), (_COPIES, "copy"), (_FREE, "free"), ({"cat", "stack"}, "cat")):
        if name in names:
            return kind, "nothing"  # type: ignore[return-value]
    return "unmodeled", "input"


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every ATen operation; a view is the same value as its base."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.layers: list[str] = [""]
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # otherwise a reused address would be taken for the old tensor

    def add_tensor(self, tensor: Tensor, *, is_weight: bool, needs_grad: bool) -> None:
        """Register a tensor before the pass."""
        self._values[_memory(tensor)] = self._new(tensor, is_weight=is_weight, needs_grad=needs_grad)

    def value_of(self, tensor: Tensor) -> Value:
        """Current value of a tensor's memory."""
        if _memory(tensor) not in self._values:
            self.add_tensor(tensor, is_weight=False, needs_grad=False)
        return self._values[_memory(tensor)]

    def _new(self, tensor: Tensor, *, is_weight: bool, needs_grad: bool) -> Value:
        self._alive.append(tensor)
        return Value(
            numel=tensor.numel(),
            width=None if tensor.is_floating_point() else tensor.element_size(),
            is_vector=tensor.numel() == max(tensor.shape, default=1),
            is_weight=is_weight,
            needs_grad=needs_grad,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        schema_name, _, overload = func.name().partition("::")[2].partition(".")
        if func.is_view or schema_name in {"_unsafe_view", "_reshape_alias"}:
            base = self.value_of(_tensors((args, kwargs))[0])
            for new in _tensors(outputs):  # an unsafe view has its own storage object
                self._alive.append(new)
                self._values.setdefault(_memory(new), base)
            return outputs
        name = schema_name.removesuffix("_") if func._schema.is_mutable else schema_name
        results = _tensors(outputs)
        kind, saved = _classify(name, overload)
        if results and kind != "free":
            self.record(
                name, kind, saved, _tensors((args, kwargs)), results, forward_flops(func, args, kwargs, outputs)
            )
        return outputs

    def record(
        self, name: str, kind: Kind, saved: Saved, inputs: list[Tensor], outputs: list[Tensor], flops: int
    ) -> None:
        """Add an operation, unless all its tensors are vectors."""
        values = [self.value_of(t) for t in inputs]
        needs_grad = any(v.needs_grad and v.width is None for v in values) and outputs[0].is_floating_point()
        new = self._new(outputs[0], is_weight=False, needs_grad=needs_grad)
        if new.is_vector and all(v.is_vector for v in values):
            return
        indices = outputs[1].numel() if "max_pool" in name else 0
        op = Op(name, kind, saved, self.layers[-1], [], new, flops, indices)
        for tensor, value in zip(inputs, values, strict=True):
            use = Use(value, min(tensor.numel(), value.numel), op)
            op.inputs.append(use)
            value.uses.append(use)
        new.producer = op
        self._values[_memory(outputs[0])] = new
        if kind == "unmodeled":
            for other in outputs[1:]:
                self.add_tensor(other, is_weight=False, needs_grad=False)
        self.ops.append(op)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention as one kernel, as on a GPU; on meta tensors torch would decompose it."""
        del args, kwargs
        output = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        flops = attention_flops(query.shape, key.shape, value.shape)
        self.record("attention", "attention", "input", [query, key, value], [output], flops)
        return output


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def trace(network: nn.Module, inputs: Sequence[Tensor]) -> Graph:
    """Record the operations of a network's forward pass, in train mode.

    Args:
        network: on the meta device.
        inputs: its arguments, on the meta device; gradients flow to those that require them.

    Raises:
        ValueError: the network depends on values, so that it cannot run on meta tensors.
    """
    recorder = _Recorder()
    for parameter in network.parameters():
        recorder.add_tensor(parameter, is_weight=True, needs_grad=parameter.requires_grad)
    for tensor in inputs:
        recorder.add_tensor(tensor, is_weight=False, needs_grad=tensor.requires_grad)
    was_training = network.training
    network.train()
    try:
        with torch.no_grad(), _track_modules(network, recorder.layers), _record_attention(recorder), recorder:
            outputs = network(*inputs)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"roofline: the encoder must run on meta tensors (shapes without values), {type(network).__name__} failed "
            f"with: {first_line(error)}; set the size of the views to what it takes, and remove "
            "operations that depend on values"
        ) from error
    finally:
        network.train(was_training)
    results = [recorder.value_of(t) for t in _tensors(outputs)]
    for value in results:
        value.is_output = True
    return Graph(recorder.ops, results)


@contextmanager
def _track_modules(network: nn.Module, layers: list[str]) -> Iterator[None]:
    """Keep the name of the running module on top of the stack."""
    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(_enter, layers, name)))
        hooks.append(module.register_forward_hook(partial(_leave, layers)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _enter(layers: list[str], name: str, *_: object) -> None:
    layers.append(name)


def _leave(layers: list[str], *_: object) -> None:
    layers.pop()


@contextmanager
def _record_attention(recorder: _Recorder) -> Iterator[None]:
    """Record attention as one operation. Layers of torch and timm look the function up when they call it."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = recorder.attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
