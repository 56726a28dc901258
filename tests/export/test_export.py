"""Exported encoders: files of weights, and programs in other formats."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
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


@pytest.mark.parametrize(
    ("name", "is_set", "cifar_stem"),
    [("resnet18", False, False), ("resnet18", True, True), ("resnet18_lightly", False, True)],
)
def test_exported_resnet_loads_into_torchvision(
    name: str, is_set: bool, cifar_stem: bool, tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(configs.replace(tiny, {"steps": 2, "model": {"encoder": name, "cifar_stem": is_set}}))
    run = trainer.fit().run_dir

    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    if cifar_stem:
        encoder.conv1, encoder.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    if name == "resnet18_lightly":
        encoder.relu = torch.nn.Identity()
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
    assert metadata.get("stem_relu", True) == (name == "resnet18")

    capsys.readouterr()
    assert command.main([str(run)]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert bool(lines) == (name == "resnet18_lightly")
    if lines:
        plain = torchvision.models.resnet18()
        plain.fc = torch.nn.Identity()
        exec("\n".join(map(str.strip, lines[1:])), {"torch": torch, "encoder": plain})
        plain.load_state_dict(load_file(run / "encoder.safetensors"))
        assert torch.equal(plain.eval()(x), encoder(x))


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


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_program_of_a_stem_without_relu_has_its_features(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18_lightly")
    encoder(torch.randn(8, 3, 32, 32))  # BN statistics other than 0 and 1
    metadata: dict[str, Any] = {"encoder": "resnet18_lightly", "cifar_stem": True, "feature_dim": 512, "step": 1}
    metadata |= {"image_size": 32, "preprocessing": Preprocessing(crop=32).to_dict()}
    x = torch.randn(3, 3, 32, 32)
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = runtime.InferenceSession(export_as(encoder, metadata, format, tmp_path).path)
        features = torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])
    else:
        program = torch.export.load(export_as(encoder, metadata, format, tmp_path).path).module()
        features = program(x)
    with torch.no_grad():
        expected = encoder.eval().double()(x.double()).float()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "cifar_stem", "size"),
    [("resnet18", False, 64), ("resnet18", True, 32), ("resnet18_lightly", True, 32), ("vit_b_32", False, 64)],
)
def test_timm_features_equal_encoder(
    name: str, cifar_stem: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=size, cifar_stem=cifar_stem)
    encoder(torch.randn(8, 3, size, size))
    dim = feature_dim(encoder, size)
    metadata: dict[str, Any] = {"encoder": name, "cifar_stem": cifar_stem, "feature_dim": dim, "image_size": size}
    metadata |= {"preprocessing": Preprocessing(crop=size).to_dict(), "step": 1}
    result = export_as(encoder.eval(), metadata, "timm", tmp_path)
    if cifar_stem:
        printed: dict[str, Any] = {"timm": timm, "torch": torch, "safetensors": safetensors}
        monkeypatch.chdir(tmp_path)
        exec(result.note.removeprefix("load it with "), printed)
        model = printed["model"]
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
