"""Exported encoders: files of weights, and programs in other formats."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from byol_fast import config as configs
from byol_fast.cli import export as command
from byol_fast.config import Config, ConfigError, Preprocessing
from byol_fast.export.encoder import export_run, load_encoder
from byol_fast.export.formats import MAX_DIFFERENCE, ExportError, export_as
from byol_fast.models.encoders import build_encoder, feature_dim
from byol_fast.training.trainer import Trainer
from tests.training.helpers import file_size_limit


@pytest.mark.parametrize("cifar_stem", [False, True])
def test_exported_resnet_loads_into_torchvision(tiny: Config, cifar_stem: bool) -> None:
    trainer = Trainer(configs.replace(tiny, {"steps": 2, "model": {"encoder": "resnet18", "cifar_stem": cifar_stem}}))
    run = trainer.fit().run_dir

    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    if cifar_stem:
        encoder.conv1, encoder.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    encoder.load_state_dict(load_file(run / "encoder.safetensors"))

    x = torch.randn(4, 3, 32, 32)
    trained = trainer.model.encoder
    assert torch.equal(encoder.eval()(x), trained.to(memory_format=torch.contiguous_format).eval()(x))
    ours, metadata = load_encoder(run)
    assert torch.equal(ours(x), encoder(x))
    assert metadata == json.loads((run / "encoder.json").read_text())
    assert (metadata["feature_dim"], metadata["cifar_stem"], metadata["step"], metadata["image_size"]) == (
        512,
        cifar_stem,
        2,
        16,
    )


def test_export_of_run_equals_its_encoder_files(tiny: Config, tmp_path: Path) -> None:
    run = Trainer(configs.replace(tiny, {"steps": 2})).fit().run_dir
    weights, metadata = export_run(run, tmp_path / "elsewhere")
    first, second = load_file(weights), load_file(run / "encoder.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert metadata.read_text() == (run / "encoder.json").read_text()


def test_run_without_export_loads_latest_checkpoint(tiny: Config) -> None:
    run = Trainer(configs.replace(tiny, {"steps": 2})).fit().run_dir
    exported, metadata = load_encoder(run)
    (run / "encoder.safetensors").unlink()
    encoder, same = load_encoder(run)
    assert same == metadata
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(encoder(x), exported(x))


def test_missing_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="byol-fast export RUN"):
        load_encoder(tmp_path)
    checkpoint = tmp_path / "model.pt"
    checkpoint.touch()
    with pytest.raises(FileNotFoundError, match=r"model\.pt must be a run folder .*; .*\(module, metadata"):
        load_encoder(checkpoint)


# ---- programs and other names --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small convolutional network with BN statistics of data, and its metadata."""
    torch.manual_seed(0)
    block = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    encoder = torch.nn.Sequential(*block, torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.AvgPool2d(9))
    encoder(torch.randn(8, 3, 24, 24))  # BN statistics other than 0 and 1
    metadata = {"encoder": "small", "cifar_stem": False, "feature_dim": 16, "image_size": 24, "step": 3}
    preprocessing = Preprocessing(crop=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)).to_dict()
    return encoder.eval(), metadata | {"preprocessing": preprocessing, "recipe": "tiny"}


def test_exported_program_takes_uint8_of_any_batch_size(
    small: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path
) -> None:
    encoder, metadata = small
    result = export_as(encoder, metadata, "torch-export", tmp_path, with_normalize=True)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.pt2"]
    described = {"encoder.json": ""}
    program = torch.export.load(result.path, extra_files=described).module()
    assert json.loads(described["encoder.json"])["input"] == "images [B, 3, 24, 24], uint8"
    for count in (1, 3, 9):
        pixels = torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8)
        mean, std = (torch.tensor(metadata["preprocessing"][name]).view(3, 1, 1) for name in ("mean", "std"))
        x = (pixels.double() / 255 - mean) / std
        with torch.no_grad():
            expected = copy.deepcopy(encoder).double()(x).flatten(1).float()
            got = program(pixels)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert result.difference is not None
    assert result.difference <= MAX_DIFFERENCE * result.largest


@pytest.mark.parametrize("with_normalize", [False, True])
def test_onnx_features_equal_encoder(
    small: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path, with_normalize: bool
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    encoder, metadata = small
    result = export_as(encoder, metadata, "onnx", tmp_path, with_normalize=with_normalize)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]
    assert result.batches == (1, 5)
    model = onnx.load(result.path)
    onnx.checker.check_model(model)
    kind = "uint8" if with_normalize else "float32, (x / 255 - mean) / std"
    assert {p.key: p.value for p in model.metadata_props}["input"] == f"images [B, 3, 24, 24], {kind}" == result.input
    (input_shape,), (output_shape,) = (
        [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]
        for values in (model.graph.input, model.graph.output)
    )
    assert (input_shape, output_shape) == (["batch", 3, 24, 24], ["batch", 16])
    session = runtime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    for count in (1, 7):
        pixels = torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8)
        mean, std = (torch.tensor(metadata["preprocessing"][name]).view(3, 1, 1) for name in ("mean", "std"))
        x = (pixels.double() / 255 - mean) / std
        images = pixels.numpy() if with_normalize else x.float().numpy()
        (got,) = session.run(["features"], {"images": images})
        with torch.no_grad():
            expected = copy.deepcopy(encoder).double()(x).flatten(1).float()
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_different_features_are_refused(
    small: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, metadata = small
    load = torch.export.load

    def load_modified(file: Any) -> Any:
        program = load(file)
        with torch.no_grad():
            next(iter(program.state_dict.values())).mul_(1.01)
        return program

    monkeypatch.setattr(torch.export, "load", load_modified)
    with pytest.raises(ExportError, match=r"encoder.pt2 must give the encoder's features, they differ by"):
        export_as(encoder, metadata, "torch-export", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_full_disk_keeps_the_earlier_file(
    small: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path, format: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    encoder, metadata = small
    path = export_as(encoder, metadata, format, tmp_path).path
    earlier = path.read_bytes()
    with file_size_limit(1000), pytest.raises(ConfigError, match="cannot be written .*File too large"):
        export_as(encoder, metadata, format, tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == earlier


def test_unsupported_encoder_is_refused(
    small: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, metadata = small

    class Untraceable(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) if float(x.sum()) > 0 else x.amax(dim=(2, 3))

    with pytest.raises(ExportError, match=r"torch-export does not support untraceable .*--format torchvision"):
        export_as(Untraceable(), metadata | {"encoder": "untraceable"}, "torch-export", tmp_path)
    with pytest.raises(ExportError, match="must be a ResNet, ResNeXt or vision transformer .* got 'small'"):
        export_as(encoder, metadata, "timm", tmp_path)
    with pytest.raises(ConfigError, match=r"format timm cannot include the normalization; drop --with-normalize"):
        export_as(encoder, metadata, "timm", tmp_path, with_normalize=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written .*choose another folder"):
        export_as(encoder, metadata, "torch-export", tmp_path / "file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx needs onnx and onnxscript; pip install onnx onnxscript"):
        export_as(encoder, metadata, "onnx", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "cifar_stem", "size"), [("resnet18", False, 64), ("resnet18", True, 32), ("vit_b_32", False, 64)]
)
def test_timm_features_equal_encoder(name: str, cifar_stem: bool, size: int, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=size, cifar_stem=cifar_stem)
    encoder(torch.randn(8, 3, size, size))
    dim = feature_dim(encoder, size)
    metadata: dict[str, Any] = {"encoder": name, "cifar_stem": cifar_stem, "feature_dim": dim, "image_size": size}
    metadata |= {"preprocessing": Preprocessing(crop=size).to_dict(), "step": 1}
    result = export_as(encoder.eval(), metadata, "timm", tmp_path)
    if cifar_stem:
        model = timm.create_model(name, num_classes=0)
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
        model.load_state_dict(load_file(result.path))
    elif name == "resnet18":
        model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(result.path))
    else:
        model = timm.create_model(
            "vit_base_patch32_224", num_classes=0, img_size=size, checkpoint_path=str(result.path)
        )
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), encoder(x), rtol=1e-4, atol=1e-4)


def test_command_exports_run_and_exported_encoder(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(configs.replace(tiny, {"steps": 2})).fit().run_dir
    capsys.readouterr()
    for source in (run, run / "encoder.safetensors"):  # then from the exported files, without checkpoints
        assert command.main([str(source), "--format", "torch-export", "--output", str(tmp_path / "to")]) == 0
        printed = capsys.readouterr().out
        assert "encoder.pt2" in printed
        assert "input: images [B, 3, 16, 16], float32, (x / 255 - mean) / std; B is any number\n" in printed
        assert "equal to the encoder: largest difference" in printed
    assert command.main([str(run), "--format", "timm", "--output", str(tmp_path / "to")]) == 1
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["encoder.pt2"]
