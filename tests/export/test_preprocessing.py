"""The preprocessing of an encoder goes with it: each exported format gives the features of `embed` for photographs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms import functional as F

from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing, recipes
from byol_fast.config.evaluation import KNNSettings
from byol_fast.data.sources import FileSource
from byol_fast.evaluate import embed_folder, load_pretrained
from byol_fast.evaluate.runner import EvalContext
from byol_fast.export.encoder import export_encoder, load_encoder
from byol_fast.export.formats import export_as, timm_data_config
from byol_fast.export.transform import EvalTransform
from byol_fast.models.encoders import build_encoder
from byol_fast.training.knn_monitor import KNNMonitor
from byol_fast.utils.progress import Progress
from tests.conftest import real_data
from tests.photographs import made_photographs, real_photographs


@pytest.fixture(scope="module")
def config() -> Config:
    changes = {"view1.interpolation": "bilinear", "view1.size": 32, "view2.size": 32, "model.cifar_stem": False}
    return configs.replace(recipes.cifar10_resnet18(), changes | {"model.mean": (0.5, 0.4, 0.3)})


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder with BN statistics of data."""
    torch.manual_seed(0)
    network = build_encoder("resnet18")
    network(torch.randn(16, 3, 32, 32))
    folder = tmp_path_factory.mktemp("encoder")
    export_encoder(network, config, folder, step=7, feature_dim=512)
    return folder


@pytest.fixture
def encoder(trained: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(trained, tmp_path / "encoder"))


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder in the format of the parameter."""
    if request.param == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder = tmp_path_factory.mktemp("exported")
    return export_as(*load_encoder(trained), request.param, folder, with_normalize=request.param != "timm").path


@pytest.fixture(params=["made", "imagenet_sample.tar"])
def photographs(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    (tmp_path / "photographs").mkdir()
    if request.param == "made":
        return made_photographs(tmp_path / "photographs")
    return real_photographs(real_data(request.param), tmp_path / "photographs")


def pixels(path: Path, preprocessing: dict[str, Any]) -> Tensor:
    """The crop of a photograph by torchvision, uint8 `[1, 3, S, S]`, as a file's metadata describe it."""
    image, size = Image.open(path).convert("RGB"), preprocessing["crop"]
    if min(image.size) != size:
        image = F.resize(image, preprocessing["resize"], F.InterpolationMode(preprocessing["interpolation"]))
    crop: Tensor = F.pil_to_tensor(F.center_crop(image, size))
    return crop[None]


def normalized(crop: Tensor, preprocessing: dict[str, Any]) -> Tensor:
    x: Tensor = F.normalize(crop.double() / 255, preprocessing["mean"], preprocessing["std"]).float()
    return x


def described(path: Path) -> dict[str, Any]:
    """The preprocessing in the metadata of an exported file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["preprocessing"]))
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path, load_external_data=False)
        return dict(json.loads({p.key: p.value for p in model.metadata_props}["preprocessing"]))
    extra = {"encoder.json": ""}
    torch.export.load(path, extra_files=extra)
    return dict(json.loads(extra["encoder.json"])["preprocessing"])


def network_of(path: Path) -> Any:
    """A function from images to features: the exported file in the program that it is for."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("resnet18", num_classes=0, checkpoint_path=path).eval()


FORMATS = ["torch-export", "onnx", pytest.param("timm", marks=pytest.mark.peers)]


@torch.no_grad()
@pytest.mark.parametrize("exported", FORMATS, indirect=True)
def test_format_gives_the_features_of_embed(exported: Path, trained: Path, photographs: list[Path]) -> None:
    preprocessing, network = described(exported), network_of(exported)
    assert preprocessing == json.loads((trained / "encoder.json").read_text())["preprocessing"]
    crops = torch.cat([pixels(path, preprocessing) for path in photographs])
    # The other two formats include the normalization.
    features = network(normalized(crops, preprocessing) if exported.suffix == ".safetensors" else crops)
    embedded = embed_folder(trained, photographs[0].parent, device="cpu", precision="fp32", threads=1)
    expected = torch.from_numpy(embedded.features)
    assert torch.nn.functional.cosine_similarity(features, expected).min() > 1 - 1e-6
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_transform_evaluation_and_monitor_see_the_same_images(
    config: Config, trained: Path, photographs: list[Path]
) -> None:
    """Bit for bit; the bytes of crops are those of torchvision."""
    _, metadata = load_encoder(trained)
    crops = torch.cat([pixels(path, metadata["preprocessing"]) for path in photographs])
    transform = EvalTransform(metadata)
    x = torch.stack([transform(Image.open(path)) for path in photographs])
    torch.testing.assert_close(x, normalized(crops, metadata["preprocessing"]), rtol=0, atol=1e-6)

    source = FileSource(
        root=photographs[0].parent,
        paths=tuple(path.name for path in photographs),
        labels=np.arange(len(photographs)) % 2,
        classes=("a", "b"),
    )
    pretrained = load_pretrained(trained)
    context = EvalContext(KNNSettings(device="cpu", threads=1), Progress())
    (evaluated, _), *_ = context.batches(pretrained, source)
    assert torch.equal(evaluated, crops) and torch.equal(pretrained.normalize(evaluated), x)

    monitored = []
    network = torch.nn.Flatten()
    network.register_forward_hook(lambda _module, inputs, _output: monitored.append(inputs[0]))
    model: Any = SimpleNamespace(encoder=network, normalize=pretrained.normalize)
    monitor = KNNMonitor(config, model, source, source, device=torch.device("cpu"), autocast=None)
    monitor(untrained=False, check=lambda: None)
    assert len(monitored) == 2 and all(torch.equal(images, x) for images in monitored)


def test_changed_preprocessing_is_used_by_embed(encoder: Path, tmp_path: Path) -> None:
    """`encoder.json` is read, not restated: another resize and crop there gives torchvision's other features."""
    (tmp_path / "photographs").mkdir()
    photographs = made_photographs(tmp_path / "photographs")
    before = json.loads((encoder / "encoder.json").read_text())
    changed = before["preprocessing"] | {"resize": 60, "crop": 48, "interpolation": "bicubic", "mean": [0.1, 0.2, 0.3]}
    (encoder / "encoder.json").write_text(json.dumps(before | {"preprocessing": changed}))
    embedded = embed_folder(encoder, tmp_path / "photographs", device="cpu", precision="fp32", threads=1)
    network, _ = load_encoder(encoder)
    with torch.no_grad():
        x = torch.cat([normalized(pixels(path, changed), changed) for path in photographs])
        np.testing.assert_allclose(embedded.features, network(x).numpy(), rtol=1e-4, atol=1e-4)


def test_metadata_of_earlier_versions_has_their_preprocessing(encoder: Path) -> None:
    metadata = json.loads((encoder / "encoder.json").read_text())
    now = metadata.pop("preprocessing")
    earlier = metadata | {name: now[name] for name in ("interpolation", "mean", "std")}
    (encoder / "encoder.json").write_text(json.dumps(earlier))
    assert load_encoder(encoder)[1]["preprocessing"] == now
    assert (now["resize"], now["crop"], now["interpolation"], now["mean"]) == (37, 32, "bilinear", [0.5, 0.4, 0.3])


@pytest.mark.parametrize("metadata", ["runs/first", Path("runs/first"), 96, None, ("encoder", {})])
def test_transform_of_no_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(TypeError, match=f"metadata must be the metadata of an encoder, got {type(metadata).__name__};"):
        EvalTransform(metadata)


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 40, 40), np.zeros((40, 40, 3), np.uint8), "photo.jpg", [Image.new("L", (40, 40))]]
)
def test_transform_refuses_what_is_no_image(image: Any, trained: Path) -> None:
    with pytest.raises(TypeError, match=f"image must be a PIL image, got {type(image).__name__}; make one with"):
        EvalTransform(load_encoder(trained)[1])(image)


def test_timm_config_gives_the_resize_back() -> None:
    """By timm's formula, for all sizes."""
    for size in range(1, 1025):
        preprocessing = Preprocessing(crop=size)
        crop_pct = timm_data_config(preprocessing)["crop_pct"]
        assert math.floor(size / crop_pct) == preprocessing.resize == round(size * 256 / 224)
        assert 0 < crop_pct <= 1


@pytest.mark.peers
def test_timm_transform_gives_the_features_of_embed(trained: Path, tmp_path: Path) -> None:
    """The printed call and timm's own transform, for photographs that are resized."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "photographs").mkdir()
    photographs = made_photographs(tmp_path / "photographs")
    result = export_as(*load_encoder(trained), "timm", tmp_path)
    call = result.note.removeprefix("load it with ").replace("'encoder_timm", f"'{tmp_path}/encoder_timm")
    model = eval(call, {"timm": timm}).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    preprocessing = load_encoder(trained)[1]["preprocessing"]
    num_equal = 0
    embedded = embed_folder(trained, tmp_path / "photographs", device="cpu", precision="fp32", threads=1)
    for path, expected in zip(photographs, torch.from_numpy(embedded.features), strict=True):
        image = Image.open(path).convert("RGB")
        x, ours = transform(image)[None], normalized(pixels(path, preprocessing), preprocessing)
        if min(image.size) == preprocessing["crop"]:
            continue
        num_equal += 1
        torch.testing.assert_close(x, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert num_equal >= 3
