"""An encoder as a program that needs none of its code: torch.export, ONNX; and with timm's names."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from byol_fast.config import ConfigError
from byol_fast.models.layers import Normalize
from byol_fast.utils.files import atomic_path

Format = Literal["torchvision", "torch-export", "onnx", "timm"]
FORMATS: tuple[str, ...] = get_args(Format)

CHECKED_BATCHES = (1, 5)
"""Numbers of images that an exported program is tried with; neither is the one it was traced with."""
TRACED_BATCH = 2
LIMIT = 1e-4
"""Largest difference of a feature that is taken for rounding, as a share of the largest feature."""

RESNETS = re.compile(r"(wide_)?resnet\d+(_\d)?|resnext\d+_\d+x\d+d")


class ExportError(RuntimeError):
    """A format cannot hold this encoder, or does not compute what it does."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written, and how it was checked."""

    path: Path
    difference: float | None
    """Largest absolute difference of a feature from the encoder's; None where there was nothing to run it with."""
    largest: float
    """Largest feature in size, to compare it with."""
    batches: tuple[int, ...]
    """Numbers of images it was tried with."""
    note: str = ""
    """What else there is to know."""


class Standalone(nn.Module):
    """What is exported: features `[B, D]`, of uint8 images if normalisation is part of it.

    Args:
        encoder: without its classifier.
        normalize: applied first; None for input that is normalised already.
    """

    def __init__(self, encoder: nn.Module, normalize: Normalize | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, D]` of `[B, 3, S, S]`."""
        x = images if self.normalize is None else self.normalize(images)
        features: Tensor = self.encoder(x).flatten(1)
        return features


def export_as(
    encoder: nn.Module, about: dict[str, Any], form: str, folder: Path, *, with_normalize: bool = False
) -> Exported:
    """Write an encoder in a format, and compare what was written with it.

    Args:
        encoder: the network, of any dtype on any device; itself unchanged.
        about: its description, as `load_encoder` returns it; the file carries it too.
        form: torch-export (`encoder.pt2`), onnx (`encoder.onnx`) or timm (`encoder_timm.safetensors`).
        folder: where to write; made when missing.
        with_normalize: put `(x / 255 - mean) / std` in front: the input is then uint8.

    Returns:
        The file, and the largest difference.

    Raises:
        ConfigError: the folder cannot be written, a package is missing, the options do not go together.
        ExportError: the format cannot hold the encoder, or the result differs; then no file is left behind.
    """
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if form == "timm":
            return _export_timm(encoder, about, folder / "encoder_timm.safetensors", with_normalize)
        normalize = Normalize(tuple(about["mean"]), tuple(about["std"])) if with_normalize else None
        module = Standalone(encoder, normalize).eval()
        if form == "torch-export":
            return _export_program(module, about, folder / "encoder.pt2")
        if form == "onnx":
            return _export_onnx(module, about, folder / "encoder.onnx")
    except OSError as error:
        raise ConfigError(f"export: {folder} cannot be written ({error}); choose another folder") from error
    raise ConfigError(f"export: format must be one of {', '.join(FORMATS)}, got {form!r}")


def _images(module: Standalone, about: dict[str, Any], count: int) -> Tensor:
    """Random images as the module takes them: bytes, or such bytes normalised."""
    size = about["image_size"]
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return pixels if module.normalize is not None else Normalize(tuple(about["mean"]), tuple(about["std"]))(pixels)


def _described(module: Standalone, about: dict[str, Any]) -> dict[str, Any]:
    size = about["image_size"]
    kind = "uint8" if module.normalize is not None else "float32, (x / 255 - mean) / std"
    return about | {
        "input": f"images [B, 3, {size}, {size}], {kind}",
        "output": f"features [B, {about['feature_dim']}]",
    }


@torch.no_grad()
def _compare(module: Standalone, about: dict[str, Any], path: Path, run: Callable[[Tensor], Tensor]) -> Exported:
    """Run what was written beside the encoder.

    Raises:
        ExportError: they differ by more than rounding.
    """
    difference = largest = 0.0
    for count in CHECKED_BATCHES:
        images = _images(module, about, count)
        expected, got = module(images), run(images)
        if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
            raise ExportError(
                f"export: {path.name} gives {list(got.shape)} for {list(expected.shape)}; nothing written"
            )
        difference = max(difference, float((got - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if difference > LIMIT * largest:
        raise ExportError(
            f"export: {path.name} must give the encoder's features, it differs by {difference:.3g} (largest feature: "
            f"{largest:.3g}); nothing written. Use another format"
        )
    return Exported(path, difference, largest, CHECKED_BATCHES)


def _traced(module: Standalone, about: dict[str, Any], what: str) -> torch.export.ExportedProgram:
    """The encoder as a graph, with any number of images.

    Raises:
        ExportError: its code cannot be traced.
    """
    example = _images(module, about, TRACED_BATCH)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=_any_batch())
    except Exception as error:  # torch raises all kinds of errors on code it cannot trace
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"export: {what} cannot hold {about['encoder']} for any number of images ({reason}); use --format "
            "torchvision"
        ) from error


def _any_batch() -> dict[str, dict[int, Any]]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _export_program(module: Standalone, about: dict[str, Any], path: Path) -> Exported:
    program = _traced(module, about, "torch-export")
    buffer = io.BytesIO()  # given a path, torch insists on its ending, which a temporary file has not
    torch.export.save(program, buffer, extra_files={"encoder.json": json.dumps(_described(module, about))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        written = torch.export.load(io.BytesIO(temporary.read_bytes())).module()
        return _compare(module, about, path, written)


def _export_onnx(module: Standalone, about: dict[str, Any], path: Path) -> Exported:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export: onnx needs {' and '.join(missing)}; pip install 'byol_fast[onnx]'")
    program = _traced(module, about, "onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of what is about to change in torch
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=_any_batch(),  # again, or its name is lost
                verbose=False,
            )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"export: onnx cannot hold {about['encoder']} ({reason}); use torch-export") from error
    assert onnx is not None
    for name, value in _described(module, about).items():
        onnx.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    with atomic_path(path) as temporary:
        onnx.save(temporary, external_data=False)
        if importlib.util.find_spec("onnxruntime") is None:
            return Exported(path, None, 0.0, (), "not verified: pip install onnxruntime, and export again to be sure")
        return _compare(module, about, path, _onnxruntime(temporary))


def _onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# ---- timm ----------------------------------------------------------------------------------------------------------

_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)
"""Names of torchvision's vision transformer, and timm's."""

_VIT_SIZES = {"b": "base", "l": "large", "h": "huge"}


def timm_name(about: dict[str, Any]) -> str:
    """The name timm has for an encoder of torchvision.

    Raises:
        ExportError: it has none whose weights are the same.
    """
    name: str = about["encoder"]
    if name.startswith("timm/"):
        return name.removeprefix("timm/")
    if RESNETS.fullmatch(name):
        return name
    if match := re.fullmatch(r"vit_([blh])_(\d+)", name):
        return f"vit_{_VIT_SIZES[match[1]]}_patch{match[2]}_224"
    raise ExportError(
        f"export: timm holds torchvision's ResNets, ResNeXts and vision transformers, and timm/NAME, got {name!r}; use "
        "another format"
    )


def _export_timm(encoder: nn.Module, about: dict[str, Any], path: Path, with_normalize: bool) -> Exported:
    if with_normalize:
        raise ConfigError("export: timm's weights hold no normalisation; drop --with-normalize")
    name = timm_name(about)
    state = {key: tensor.detach().clone().contiguous() for key, tensor in encoder.state_dict().items()}
    if about["encoder"].startswith("vit_"):
        state = {_vit_key(key): tensor for key, tensor in state.items()}
    arguments: dict[str, Any] = {"num_classes": 0}
    if name.startswith("vit_"):
        arguments["img_size"] = about["image_size"]
    shown = ", ".join(f"{key}={value}" for key, value in arguments.items())
    note = f"timm.create_model({name!r}, {shown}, checkpoint_path={path.name!r})"
    if about["cifar_stem"]:
        note = (
            f"model = timm.create_model({name!r}, {shown}); model.conv1, model.maxpool = "
            "torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity(); "
            f"model.load_state_dict(safetensors.torch.load_file({path.name!r}))"
        )
    described = about | {"timm": name, "load": note}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"} | metadata)
        if importlib.util.find_spec("timm") is None:
            return Exported(path, None, 0.0, (), f"not verified, timm is not installed; load it with {note}")
        module = Standalone(encoder, None).eval()
        checked = _compare(module, about, path, _timm(temporary, name, arguments, about["cifar_stem"]))
    return Exported(path, checked.difference, checked.largest, checked.batches, f"load it with {note}")


def _vit_key(key: str) -> str:
    for pattern, replacement in _VIT:
        key = re.sub(pattern, replacement, key)
    return key


def _timm(path: Path, name: str, arguments: dict[str, Any], cifar_stem: bool) -> nn.Module:
    """The model of timm with the weights of a file."""
    import timm
    from safetensors.torch import load_file

    try:
        model: nn.Module = timm.create_model(name, **arguments)
        if cifar_stem:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"export: timm's {name} does not take these weights ({reason}); nothing written") from error
    return model.eval()
