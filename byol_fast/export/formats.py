"""Export of encoders to torch.export, ONNX and timm."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from byol_fast.config import ConfigError, Preprocessing
from byol_fast.config.resnets import LIGHTLY_RESNET, TORCHVISION_RESNET, has_stem_relu
from byol_fast.models.encoders import create_timm_model
from byol_fast.models.layers import Normalize
from byol_fast.utils.checkpoint import check_finite
from byol_fast.utils.errors import first_line
from byol_fast.utils.files import atomic_path, write_errors

Format = Literal["torchvision", "torch-export", "onnx", "timm"]
FORMATS: tuple[str, ...] = get_args(Format)

COMPARED_BATCHES = (1, 5)
"""Batch sizes that an exported file is compared at; different from the traced one."""
TRACED_BATCH = 2
MAX_DIFFERENCE = 1e-4
"""Largest difference from the encoder's features, relative to the largest feature; more is not rounding."""


class ExportError(RuntimeError):
    """The format does not support the encoder, or the exported file computes other features."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An exported file and its comparison with the encoder."""

    path: Path
    input: str
    """Shape and kind of its input."""
    difference: float | None
    """Largest absolute difference of a feature; None if the file could not be run."""
    largest: float
    """Largest absolute feature."""
    batches: tuple[int, ...]
    """Batch sizes of the comparison."""
    note: str = ""
    """A hint for the user."""


class ExportModule(nn.Module):
    """Encoder with optional normalization in front.

    Args:
        encoder: without a classifier.
        normalize: applied first, to uint8 images; None: images are normalized already.
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
    encoder: nn.Module, metadata: dict[str, Any], format: str, folder: Path, *, with_normalize: bool = False
) -> ExportResult:
    """Write an encoder in a format, and compare the file with the encoder.

    Args:
        encoder: the network, of any dtype on any device; not modified.
        metadata: its metadata, as `load_encoder` returns it; written into the file.
        format: torch-export (`encoder.pt2`), onnx (`encoder.onnx`) or timm (`encoder_timm.safetensors`).
        folder: where to write; created if missing.
        with_normalize: include `(x / 255 - mean) / std`; the input is then uint8.

    Returns:
        The file and the largest difference.

    Raises:
        ConfigError: the folder cannot be written, a package is missing, or the options contradict each other.
        ExportError: the format does not support the encoder, or the features differ; no file is written.
        CheckpointError: a weight or a buffer is not finite; no file is written.
    """
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    check_finite(encoder.state_dict(), "export: the encoder")
    with write_errors(folder, "export", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if format == "timm":
            return _export_timm(encoder, metadata, folder / "encoder_timm.safetensors", with_normalize)
        module = ExportModule(encoder, _normalize(metadata) if with_normalize else None).eval()
        if format == "torch-export":
            return _export_program(module, metadata, folder / "encoder.pt2")
        if format == "onnx":
            return _export_onnx(module, metadata, folder / "encoder.onnx")
    raise ConfigError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")


def _random_images(module: ExportModule, metadata: dict[str, Any], count: int) -> Tensor:
    """Random images as the module takes them: uint8, or normalized."""
    size = Preprocessing.of_metadata(metadata).crop
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return pixels if module.normalize is not None else _normalize(metadata)(pixels)


def _normalize(metadata: dict[str, Any]) -> Normalize:
    preprocessing = Preprocessing.of_metadata(metadata)
    return Normalize(preprocessing.mean, preprocessing.std)


def _file_metadata(module: ExportModule, metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata | {
        "input": _input(module, metadata),
        "output": f"features [B, {metadata['feature_dim']}]",
    }


def _input(module: ExportModule, metadata: dict[str, Any]) -> str:
    """Shape and kind of the images that an exported program takes."""
    size = Preprocessing.of_metadata(metadata).crop
    kind = "uint8" if module.normalize is not None else "float32, (x / 255 - mean) / std"
    return f"images [B, 3, {size}, {size}], {kind}"


def _as_strings(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


@torch.no_grad()
def _compare(
    module: ExportModule, metadata: dict[str, Any], path: Path, run: Callable[[Tensor], Tensor]
) -> ExportResult:
    """Compare the features of an exported file with those of the encoder.

    Raises:
        ExportError: they differ by more than rounding.
    """
    difference = largest = 0.0
    for count in COMPARED_BATCHES:
        images = _random_images(module, metadata, count)
        expected, got = module(images), run(images)
        if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
            raise ExportError(
                f"export: {path.name} must give finite features {list(expected.shape)}, got {list(got.shape)}; nothing "
                "written"
            )
        difference = max(difference, float((got - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if difference > MAX_DIFFERENCE * largest:
        raise ExportError(
            f"export: {path.name} must give the encoder's features, they differ by {difference:.3g} (largest feature: "
            f"{largest:.3g}); nothing written, use another format"
        )
    return ExportResult(path, _input(module, metadata), difference, largest, COMPARED_BATCHES)


def _trace(module: ExportModule, metadata: dict[str, Any], format: Format) -> torch.export.ExportedProgram:
    """The encoder as a graph with a dynamic batch size.

    Raises:
        ExportError: the code of the encoder cannot be traced.
    """
    example = _random_images(module, metadata, TRACED_BATCH)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=_dynamic_batch())
    except Exception as error:  # torch raises all kinds of errors on code it cannot trace
        raise ExportError(
            f"export: {format} does not support {metadata['encoder']} with any number of images "
            f"({first_line(error)}); use --format torchvision"
        ) from error


def _dynamic_batch() -> dict[str, dict[int, Any]]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _export_program(module: ExportModule, metadata: dict[str, Any], path: Path) -> ExportResult:
    program = _trace(module, metadata, "torch-export")
    buffer = io.BytesIO()  # torch requires a suffix that a temporary path does not have
    torch.export.save(program, buffer, extra_files={"encoder.json": json.dumps(_file_metadata(module, metadata))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        loaded = torch.export.load(io.BytesIO(temporary.read_bytes())).module()
        return _compare(module, metadata, path, loaded)


def _export_onnx(module: ExportModule, metadata: dict[str, Any], path: Path) -> ExportResult:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export: onnx needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    program = _trace(module, metadata, "onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within torch
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=_dynamic_batch(),  # for the name of the dimension
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"export: onnx does not support {metadata['encoder']} ({first_line(error)}); use torch-export"
        ) from error
    assert onnx is not None
    onnx.model.metadata_props.update(_as_strings(_file_metadata(module, metadata)))
    with atomic_path(path) as temporary:
        onnx.save(temporary, external_data=False)
        if importlib.util.find_spec("onnxruntime") is None:
            note = "not verified; pip install onnxruntime and export again to compare it"
            return ExportResult(path, _input(module, metadata), None, 0.0, (), note)
        return _compare(module, metadata, path, _onnxruntime(temporary))


def _onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def stem_code(metadata: dict[str, Any], model: str, relu: str) -> list[str]:
    """Lines of Python that give a plain ResNet the stem of an encoder, to be run before its weights are loaded.

    Args:
        metadata: of the encoder.
        model: variable of the plain ResNet.
        relu: name of the stem's ReLU in it: `relu` in torchvision, `act1` in timm.
    """
    lines = []
    if metadata["cifar_stem"]:
        conv = "torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"
        lines.append(f"{model}.conv1, {model}.maxpool = {conv}, torch.nn.Identity()")
    if not has_stem_relu(metadata["encoder"]):
        lines.append(f"{model}.{relu} = torch.nn.Identity()")
    return lines


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
"""Patterns of the weights' names in torchvision's vision transformers, and their replacements in timm."""

_VIT_SIZES = {"b": "base", "l": "large", "h": "huge"}


def timm_name(metadata: dict[str, Any]) -> str:
    """Name in timm of an encoder.

    Raises:
        ExportError: timm has no network with the same weights.
    """
    name: str = metadata["encoder"]
    if name.startswith("timm/"):
        return name.removeprefix("timm/")
    if TORCHVISION_RESNET.fullmatch(name):
        return name
    if name == LIGHTLY_RESNET:
        return "resnet18"
    if match := re.fullmatch(r"vit_([blh])_(\d+)", name):
        return f"vit_{_VIT_SIZES[match[1]]}_patch{match[2]}_224"
    raise ExportError(
        "export: the encoder must be a ResNet, ResNeXt or vision transformer of torchvision, or timm/NAME, for format "
        f"timm, got {name!r}; use another format"
    )


def _export_timm(encoder: nn.Module, metadata: dict[str, Any], path: Path, with_normalize: bool) -> ExportResult:
    if with_normalize:
        raise ConfigError("export: format timm cannot include the normalization; drop --with-normalize")
    name = timm_name(metadata)
    state = {key: tensor.detach().clone().contiguous() for key, tensor in encoder.state_dict().items()}
    if metadata["encoder"].startswith("vit_"):
        state = {_vit_key(key): tensor for key, tensor in state.items()}
    arguments = _timm_arguments(name, metadata)
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    note = f"timm.create_model({name!r}, {shown}, checkpoint_path={path.name!r})"
    if stem := stem_code(metadata, "model", "act1"):  # `checkpoint_path` loads into the plain network
        load = f"model.load_state_dict(safetensors.torch.load_file({path.name!r}))"
        note = "; ".join([f"model = timm.create_model({name!r}, {shown})", *stem, load])
    module = ExportModule(encoder, None).eval()
    with atomic_path(path) as temporary:
        about = {"timm": name, "load": note, "pretrained_cfg": arguments["pretrained_cfg_overlay"]}
        temporary.write_bytes(save(state, metadata={"format": "pt"} | _as_strings(metadata | about)))
        if importlib.util.find_spec("timm") is None:
            note = f"not verified, timm is not installed; load it with {note}"
            return ExportResult(path, _input(module, metadata), None, 0.0, (), note)
        result = _compare(module, metadata, path, _timm(temporary, name, arguments, metadata))
    return dataclasses.replace(result, note=f"load it with {note}")


def timm_data_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The fields of timm's `pretrained_cfg` that `timm.data.resolve_model_data_config` reads.

    timm's transform has one difference: it resizes images whose shorter side is `crop`, too.
    """
    size, resize = preprocessing.crop, preprocessing.resize
    crop_pct = size / resize
    if math.floor(size / crop_pct) < resize:  # timm's way back to the resize
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "input_size": (3, size, size),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }


def _timm_arguments(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` for an encoder."""
    config = {"pretrained_cfg_overlay": timm_data_config(Preprocessing.of_metadata(metadata))}
    if not metadata["encoder"].startswith("timm/"):
        size = {"img_size": metadata["image_size"]} if name.startswith("vit_") else {}
        return {"num_classes": 0} | size | config
    _, arguments = create_timm_model(name, metadata["image_size"])
    return arguments | config


def _vit_key(key: str) -> str:
    """Name in timm of a weight of torchvision's vision transformer."""
    for pattern, replacement in _VIT:
        key = re.sub(pattern, replacement, key)
    return key


def _timm(path: Path, name: str, arguments: dict[str, Any], metadata: dict[str, Any]) -> nn.Module:
    """Model of timm with the weights of a file."""
    import timm
    from safetensors.torch import load_file

    try:
        model: nn.Module = timm.create_model(name, **arguments)
        if metadata["cifar_stem"]:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        if not has_stem_relu(metadata["encoder"]):
            model.act1 = nn.Identity()
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ExportError(
            f"export: timm's {name} does not accept these weights ({first_line(error)}); nothing written"
        ) from error
    return model.eval()
