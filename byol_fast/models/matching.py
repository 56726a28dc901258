"""Matching of a file's weights with an encoder, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MAX_DEPTH = 20
"""Levels of mappings within each other."""
_COPY = re.compile(r"momentum|target|teacher|encoder_k|key_encoder|(^|[._])ema([._]|$)")
"""Names of networks that follow another one, which is taken if both are in a file."""


@dataclass(frozen=True, slots=True)
class Match:
    """Weights of a file that fit an encoder, and those that do not."""

    prefix: str
    """Of the names in the file."""
    tensors: dict[str, Tensor]
    """Weights that fit, by the encoder's names."""
    missing: list[str]
    """The encoder's parameters and buffers that the file has not."""
    unexpected: list[str]
    """Names in the file, with the prefix, that the encoder has not."""
    mismatched: list[str]
    """Names with both shapes, where these differ."""
    num_matched: int
    """Elements of the encoder's parameters that the file has."""
    num_parameters: int
    """Elements of the encoder's parameters."""
    num_further: int
    """Elements of the unexpected tensors of layers within the encoder's own parts, as a deeper network has them."""

    @property
    def share(self) -> float:
        """Fraction, by elements, of the parameters of the encoder and of further layers in the file that match."""
        return self.num_matched / max(self.num_parameters + self.num_further, 1)


def flatten(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors in nested mappings, by their keys joined with dots."""
    result: dict[str, Tensor] = {}

    def walk(mapping: Mapping[Any, Any], prefix: str, depth: int) -> None:
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                result[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
                walk(value, f"{prefix}{key}.", depth + 1)

    walk(content, "", 1)
    return result


def match_weights(weights: Mapping[str, Tensor], encoder: nn.Module) -> Match:
    """Match weights with an encoder's parameters and buffers.

    Of all dotted prefixes of the names, that is taken by which most elements of the encoder's parameters fit; on a tie,
    one of a network that is no copy of another (a momentum encoder, a target, a teacher), else the first. A module that
    was saved as `nn.Sequential(*encoder.children())` has numbers in place of the children's names: they are counted
    through in order, as are the encoder's children that have parameters or buffers. A block's `shortcut` is its
    `downsample`.

    Args:
        weights: by name, see `flatten`.
        encoder: whose names and shapes are used, not its values.
    """
    expected = encoder.state_dict()
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    candidates = _candidates(weights, expected)

    def matched(names: Mapping[str, str]) -> int:
        return sum(sizes.get(name, 0) for name, key in names.items() if _fits(weights[key], expected[name]))

    def rank(candidate: tuple[str, bool]) -> tuple[int, bool]:
        return matched(candidates[candidate]), _COPY.search(candidate[0]) is None

    best = max(candidates, key=rank, default=("", False))
    names = candidates.get(best, {})
    fitting = {name: weights[key] for name, key in names.items() if _fits(weights[key], expected[name])}
    used = set(names.values())
    unexpected = [key for key in weights if key.startswith(best[0]) and key not in used]
    return Match(
        prefix=best[0],
        tensors=fitting,
        missing=[name for name in expected if name not in names],
        unexpected=unexpected,
        mismatched=[
            f"{name} {_kind(weights[key])} for {_kind(expected[name])}"
            for name, key in names.items()
            if name not in fitting
        ],
        num_matched=matched(names),
        num_parameters=sum(sizes.values()),
        num_further=sum(weights[key].numel() for key in _further(unexpected, best[0], names, encoder)),
    )


def _further(unexpected: list[str], prefix: str, names: Mapping[str, str], encoder: nn.Module) -> list[str]:
    """The unexpected names of layers that the encoder has not, in parts that it has: not those of a classifier."""
    part_of = {key.removeprefix(prefix).partition(".")[0]: name.partition(".")[0] for name, key in names.items()}
    layers = {name for name, _ in encoder.named_modules()}  # where a classifier was, there is an identity

    def is_further(key: str) -> bool:
        part, _, rest = key.removeprefix(prefix).partition(".")
        return part in part_of and f"{part_of[part]}.{rest}".rpartition(".")[0] not in layers

    return [key for key in unexpected if is_further(key)]


def _candidates(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[tuple[str, bool], dict[str, str]]:
    """Names in the file by the encoder's names, for each prefix; True if children have numbers behind it."""
    children = list(dict.fromkeys(name.partition(".")[0] for name in expected))
    splits = {key: [(key[:i], key[i:]) for i in (0, *(m.end() for m in re.finditer(r"\.", key)))] for key in weights}
    numbers: dict[str, set[int]] = {}
    for prefix, rest in (split for pairs in splits.values() for split in pairs):
        if (number := rest.partition(".")[0]).isdecimal():
            numbers.setdefault(prefix, set()).add(int(number))
    child_of = {prefix: dict(zip(sorted(group), children, strict=False)) for prefix, group in numbers.items()}
    result: dict[tuple[str, bool], dict[str, str]] = {}
    for key, pairs in splits.items():
        for prefix, rest in pairs:
            names = [(rest, False)]
            number, _, inner = rest.partition(".")
            if number.isdecimal() and (child := child_of[prefix].get(int(number))) is not None:
                names.append((f"{child}.{inner}", True))
            for name, is_numbered in names:
                known = name if name in expected else name.replace(".shortcut.", ".downsample.")
                if known in expected:
                    result.setdefault((prefix, is_numbered), {})[known] = key
    return result


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    """True if a tensor can be copied into another one without a change of its values beyond rounding."""
    is_same_kind = tensor.is_floating_point() == expected.is_floating_point() and not tensor.is_complex()
    return tensor.shape == expected.shape and is_same_kind and tensor.layout == torch.strided


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, with its dtype if that is no floating-point one."""
    return f"{list(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")
