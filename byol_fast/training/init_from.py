"""Initial weights from another run, a file of another library, or a package: read, matched, and loaded into a model."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from byol_fast.config import Config, ConfigError
from byol_fast.models.base import SSLModel
from byol_fast.models.builder import model_without_values
from byol_fast.models.encoders import build_encoder, check_pretrained
from byol_fast.models.matching import Match, flatten, match_weights
from byol_fast.training.init_source import PACKAGES
from byol_fast.training.run_dir import RunDir
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.env import is_first_process
from byol_fast.utils.errors import CheckpointError, reason
from byol_fast.utils.files import open_regular

log = logging.getLogger(__name__)

MIN_SHARE = 0.9
"""`Match.share` that is required without `init_partial`."""
_SHOWN = 5
_OWN_PREFIX = "model.online."
"""Prefix of the online network in our checkpoints."""


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Weights that fit a model of a configuration."""

    source: str
    """File or package that they are from."""
    sha256: str
    """Of the file, or of a package's tensors."""
    encoder: Match
    heads: dict[str, dict[str, Tensor]]
    """State of `projector` and `predictor`, those that are of a run of ours and fit."""

    def load_into(self, model: SSLModel) -> None:
        """Copy the weights into the online network; the target becomes a copy of it."""
        model.encoder.load_state_dict(self.encoder.tensors, strict=False)
        for name, state in self.heads.items():
            getattr(model.online, name).load_state_dict(state)
        for target in model.networks()[1:]:
            for name, part in target.named_children():
                part.load_state_dict(getattr(model.online, name).state_dict())

    def summary(self) -> str:
        """Line for the log: counts of what was matched, and some of the names that were not."""
        match = self.encoder
        where = f" behind {match.prefix!r}" if match.prefix else ""
        heads = f"; {' and '.join(self.heads)} taken" if self.heads else ""
        return f"initial weights of {self.source}{where}: {_counts(match)}{heads}"


def read_initial_weights(config: Config) -> InitialWeights | None:
    """Read the weights that `init_from` names and match them with the encoder; None without `init_from`.

    Args:
        config: of the run.

    Raises:
        ConfigError: they cannot be read or fetched, are not finite, not those of `init_sha256`, or fit too few of the
            encoder's parameters.
    """
    if not config.init_from:
        return None
    source = config.init_from
    if source in PACKAGES:
        check_pretrained(config.model.encoder)
    model = model_without_values(config)
    if source in PACKAGES:
        weights = _package_weights(config)
        digest = _digest(weights)
        source = f"{source} for {config.model.encoder}"
    else:
        weights, digest, path = _path_weights(Path(source))
        source = str(path)
    if config.init_sha256 not in {"", digest}:
        raise ConfigError(
            f"init_from: {source} must have the SHA-256 of init_sha256, {config.init_sha256}, got {digest}; put the "
            "file back, or start a new run without init_sha256"
        )
    match = match_weights(weights, model.encoder)
    _check_match(config, source, match)
    initial = InitialWeights(source, digest, match, _heads(weights, match.prefix, model))
    tensors = match.tensors | {f"{name}.{k}": v for name, state in initial.heads.items() for k, v in state.items()}
    if names := checkpoints.nonfinite(tensors):
        raise ConfigError(f"init_from: {source} must be finite, but {_listed(names)} are not; use other weights")
    return initial


def _check_match(config: Config, source: str, match: Match) -> None:
    """Raise a ConfigError if the weights are not the encoder's; warn if that was asked for."""
    if match.share >= MIN_SHARE:
        return
    if config.init_partial and match.num_matched:
        if is_first_process():
            log.warning(
                "init_from: %s fits by only %s; parameters that it has not are random, further layers are left out",
                source,
                f"{match.share:.1%}",
            )
        return
    fix = "choose the encoder of these weights"
    if match.num_matched:
        fix += ", or go on with what fits by --init-partial"
    least = f"at least {MIN_SHARE:.0%}" if match.num_matched else "some"
    raise ConfigError(
        f"init_from: {source} must have {least} of the parameters of encoder {config.model.encoder!r} and no deeper "
        f"layers, but has {_counts(match)}; {fix}"
    )


def _counts(match: Match) -> str:
    further = f" and {match.num_further:,} of further layers" if match.num_further else ""
    of_all = f"{match.num_matched:,} of {match.num_parameters:,} parameters{further}, {match.share:.1%}"
    parts = [f"{len(match.tensors)} tensors matched ({of_all})"]
    kinds = {"missing": match.missing, "unexpected": match.unexpected, "of another shape": match.mismatched}
    for kind, names in kinds.items():
        if names or kind != "of another shape":
            parts.append(f"{len(names)} {kind}" + (f" ({_listed(names)})" if names else ""))
    return ", ".join(parts)


def _listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _heads(weights: Mapping[str, Tensor], prefix: str, model: SSLModel) -> dict[str, dict[str, Tensor]]:
    """State of the heads that fit, if the weights are of a checkpoint of ours."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name in ("projector", "predictor") if prefix == f"{_OWN_PREFIX}encoder." else ():
        begin = f"{_OWN_PREFIX}{name}."
        state = {key.removeprefix(begin): tensor for key, tensor in weights.items() if key.startswith(begin)}
        if checkpoints.tensor_problem(state, getattr(model.online, name).state_dict()) is not None:
            break  # a predictor of another projector's outputs is of no use
        heads[name] = state
    return heads


def _package_weights(config: Config) -> dict[str, Tensor]:
    """Pretrained weights of torchvision or timm, from its cache or the network."""
    name = config.model.encoder
    try:
        return build_encoder(name, image_size=config.view1.size, pretrained=True).state_dict()
    except Exception as error:  # the packages, and those that they download with, fail in many ways
        if config.init_from == "timm":
            from huggingface_hub import constants  # comes with timm

            place = f"the cache of Hugging Face, {constants.HF_HUB_CACHE},"
        else:
            place = f"{torch.hub.get_dir()}/checkpoints"
        raise ConfigError(
            f"init_from: the weights of {name!r} are not in {place} and could not be fetched "
            f"({reason(error.__cause__ or error)}); put them there, or give a file of weights"
        ) from error


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path_weights(path: Path) -> tuple[dict[str, Tensor], str, Path]:
    """Weights, the SHA-256 of their file and its path: a file, or the newest checkpoint or the export in a folder."""
    run_dir = RunDir(path)
    if not path.is_dir():
        return *_file_weights(path), path
    if not run_dir.has_checkpoints():
        return *_file_weights(run_dir.encoder), run_dir.encoder

    def use(checkpoint: Path) -> tuple[dict[str, Tensor], str, Path]:
        weights = flatten(checkpoints.load(checkpoint))
        with checkpoint.open("rb") as file:
            return weights, hashlib.file_digest(file, "sha256").hexdigest(), checkpoint

    try:
        return checkpoints.use_latest(run_dir.checkpoints, use)
    except CheckpointError as error:
        raise ConfigError(f"init_from: {error}") from error


def _file_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Weights of a file, by their names joined with dots, and its SHA-256."""
    try:
        # Read, not mapped: a file that is cut short meanwhile would end the process (SIGBUS).
        with open(path, "rb", opener=open_regular) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            content = load_safetensors(file.read()) if path.suffix == ".safetensors" else _unpickle(file, path)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ConfigError(
            f"init_from: {path} cannot be read as weights ({reason(error)}); it is damaged, or of another kind"
        ) from error
    weights = flatten(content) if isinstance(content, Mapping) else {}
    if not weights:
        raise ConfigError(
            f"init_from: {path} must hold tensors by name, as the state_dict of a module does, got a "
            f"{type(content).__name__} without any; save the state_dict"
        )
    return weights, digest


def _unpickle(file: IO[bytes], path: Path) -> Any:
    """Content of a file of `torch.save`, without executing code of it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if forbidden is None:  # the first lines of the message are advice about classes
            raise ValueError(str(error).rpartition("WeightsUnpickler error: ")[2].strip()) from error
        raise ConfigError(
            f"init_from: {path} must hold tensors only, but holds the class {forbidden[1]}, which only code of its own "
            "could load. If you trust the file, save its state_dict with these two lines, and start from that file:\n"
            f"import torch; x = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
            "torch.save(x.state_dict() if hasattr(x, 'state_dict') else x['state_dict'], 'weights.pth')  # or its key"
        ) from error
