"""Runs that start from weights that exist: a source gives the features of its own network, or an error that helps."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.models import SSLModel, build_model
from byol_fast.models.encoders import build_encoder
from byol_fast.models.matching import match_weights
from byol_fast.models.narrow_resnet import narrow_resnet18
from byol_fast.training import builder
from byol_fast.training.init_from import read_initial_weights
from byol_fast.training.init_source import check_init_from
from byol_fast.training.trainer import Trainer
from tests.training.helpers import assert_target_is_a_copy

State = dict[str, Tensor]


def randomized(network: nn.Module, seed: int = 1) -> nn.Module:
    """A network in eval mode, also the statistics of whose batch norms are random."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.1 * noise)
    return network.eval()


def features(network: nn.Module, size: int = 32) -> Tensor:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: Tensor = network.eval()(images).flatten(1)
    return result


def without_classifier(network: nn.Module) -> nn.Module:
    """A network of torchvision whose output are its features."""
    network = copy.deepcopy(network)
    network.fc = nn.Identity()
    return network


def configured(path: Path | str, encoder: str = "resnet18_narrow", changes: dict[str, Any] | None = None) -> Config:
    sizes = {"hidden_dim": 16, "projection_dim": 8, "encoder": encoder}
    fixed = {"init_from": path, "model": sizes, "view1.size": 32, "view2.size": 32}
    return configs.replace(Config(), fixed | (changes or {}))


def initialized(config: Config) -> SSLModel:
    """The model of a configuration with its initial weights."""
    check_init_from(config)
    initial = read_initial_weights(config)
    assert initial is not None
    torch.manual_seed(0)
    model = build_model(config)
    initial.load_into(model)
    return model


def prefixed(prefix: str, state: State, factor: float = 1.0) -> State:
    return {prefix + name: tensor * factor for name, tensor in state.items()}


def moco(state: State) -> dict[str, Any]:
    """`main_moco.py`: both encoders in DataParallel, and the queue."""
    tensors = prefixed("module.encoder_k.", state, 0.5) | prefixed("module.encoder_q.", state)
    queue = {"module.queue": torch.zeros(16, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    momentum = {"state": {0: {"momentum_buffer": torch.ones(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": tensors | queue, "optimizer": momentum}


def vissl(state: State) -> dict[str, Any]:
    """`model_final_checkpoint_phase199.torch`."""
    trunk, heads = prefixed("_feature_blocks.", state), {"0.clf.0.weight": torch.zeros(8, 4)}
    model = {"model": {"trunk": trunk, "heads": heads}, "meta": {"config": {}}}
    return {"phase_idx": 199, "loss": 0.1, "classy_state_dict": {"train": True, "base_model": model}}


def solo_learn(state: State) -> dict[str, Any]:
    """A checkpoint of Lightning: networks, momentum networks and heads."""
    tensors = prefixed("momentum_backbone.", state, 0.5) | prefixed("backbone.", state)
    tensors |= {"projector.0.weight": torch.zeros(8, 4), "classifier.bias": torch.zeros(3)}
    return {"epoch": 9, "state_dict": tensors, "hyper_parameters": {"method": "byol", "backbone": {"name": "resnet18"}}}


def numbered(state: State) -> State:
    """`backbone = nn.Sequential(*list(resnet.children())[:-1])`, as in lightly's tutorials."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    names = {name: name.partition(".") for name in state if not name.startswith("fc.")}
    return {f"backbone.{numbers[child]}.{rest}": state[name] for name, (child, _, rest) in names.items()}


SOURCES: dict[str, tuple[Callable[[State], Any], str]] = {
    "state_dict": (dict, ".pth"),
    "safetensors": (dict, ".safetensors"),
    "compiled in DDP": (lambda state: {"model": prefixed("module._orig_mod.", state)}, ".pt"),
    "MoCo": (moco, ".pth.tar"),
    "VISSL": (vissl, ".torch"),
    "solo-learn": (solo_learn, ".ckpt"),
    "numbered children": (numbered, ".pth"),
}
"""Content of a file with a network's state, and the end of its name."""


def write(path: Path, content: Any) -> Path:
    """Write a file as the libraries do; names that end in .tar in the format before zip archives."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".tar")
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_file_of_a_library_gives_the_features_of_its_network(source: str, tmp_path: Path) -> None:
    network = randomized(narrow_resnet18())
    layout, suffix = SOURCES[source]
    path = write(tmp_path / f"weights{suffix}", layout(network.state_dict()))
    model = initialized(configured(path))
    torch.testing.assert_close(features(model.encoder), features(without_classifier(network)), rtol=0, atol=1e-6)
    assert_target_is_a_copy(model)


@pytest.mark.peers
@pytest.mark.parametrize("encoder", ["resnet18", "resnet18_lightly"])
def test_module_of_lightly_gives_its_features(encoder: str, tmp_path: Path) -> None:
    """The networks of lightly's BYOL example and of its CIFAR-10 benchmark, which save the whole module's state."""
    from lightly.models import ResNetGenerator
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad

    whole = torchvision.models.resnet18() if encoder == "resnet18" else ResNetGenerator("resnet-18")
    backbone = nn.Sequential(*list(whole.children())[:-1], nn.AdaptiveAvgPool2d(1))
    heads = BYOLProjectionHead(512, 16, 8), BYOLPredictionHead(8, 16, 8)
    modules = nn.ModuleDict({"backbone_momentum": copy.deepcopy(backbone), "backbone": randomized(backbone)})
    modules.update({"projection_head": heads[0], "prediction_head": heads[1]})
    deactivate_requires_grad(modules["backbone_momentum"])
    path = write(tmp_path / "last.ckpt", {"state_dict": modules.state_dict()})
    model = initialized(configured(path, encoder))
    torch.testing.assert_close(features(model.encoder), features(backbone), rtol=0, atol=1e-6)


def test_torchvision_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "shufflenet_v2_x0_5"
    network = randomized(torchvision.models.get_model(name))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / Path(torchvision.models.get_model_weights(name).DEFAULT.url).name)
    config = configured("torchvision", name)
    model = initialized(config)
    torch.testing.assert_close(features(model.encoder), features(without_classifier(network)), rtol=0, atol=1e-6)
    first, second = read_initial_weights(config), read_initial_weights(config)
    assert first is not None and second is not None
    assert re.fullmatch("[0-9a-f]{64}", first.sha256) and first.sha256 == second.sha256


@pytest.mark.peers
def test_timm_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"weights of 'timm/test_resnet' are not in .*{tmp_path}.* file of weights"):
        read_initial_weights(configured("timm", "timm/test_resnet"))

    network: Any = randomized(timm.create_model("test_resnet"))
    repository = tmp_path / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    revision = "0" * 40
    for folder in ("refs", f"snapshots/{revision}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    save_file(network.state_dict(), repository / "snapshots" / revision / "model.safetensors")
    model = initialized(configured("timm", "timm/test_resnet"))
    network.reset_classifier(0)
    torch.testing.assert_close(features(model.encoder), features(network), rtol=0, atol=1e-6)


@pytest.mark.peers
def test_timm_encoder_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="timm has no pretrained weights of 'timm/botnet50ts_256'"):
        read_initial_weights(configured("timm", "timm/botnet50ts_256"))


def test_missing_network_is_an_error_before_images_are_listed(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(builder, "open_train_val", lambda *_: pytest.fail("images are listed"))
    encoder = {"model.encoder": "shufflenet_v2_x0_5", "model.cifar_stem": False}
    config = configs.replace(tiny, {"init_from": "torchvision"} | encoder)
    expected = rf"weights of 'shufflenet_v2_x0_5' are not in {tmp_path}/hub/checkpoints and could not be .* \(URLError"
    with pytest.raises(ConfigError, match=expected):
        Trainer(config)
    assert not (tiny.out / tiny.name).exists()


def damaged(path: Path) -> None:
    torch.save(narrow_resnet18().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def saved(content: Callable[[State], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(content(narrow_resnet18().state_dict()), path)


def few(state: State) -> State:
    """The stem and the classifier, and what the encoder has not."""
    others = {f"extra{i}.weight": torch.ones(2) for i in range(7)}
    return {name: tensor for name, tensor in state.items() if name.startswith(("conv1", "bn1", "fc"))} | others


_FEW = (
    r"at least 90% of the parameters of encoder 'resnet18_narrow' and no deeper layers, but has 6 tensors matched "
    r"\(9,536 of [\d,]+ parameters, 0.3%\), 120 missing \(layer1.0.conv1.weight, layer1.0.bn1.weight, "
    r"layer1.0.bn1.bias, layer1.0.bn1.running_mean, layer1.0.bn1.running_var and 115 more\), 9 unexpected \("
    r"fc.weight, fc.bias, extra0.weight, extra1.weight, extra2.weight and 4 more\); .* by --init-partial"
)
REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "damaged": (damaged, {}, r"weights.pt cannot be read as weights \(.*it is damaged"),
    "text": (lambda path: path.write_text("weights"), {}, "cannot be read as weights"),
    "a list": (saved(lambda state: [*state.values()]), {}, "must hold tensors by name, .* got a list without any"),
    "few": (saved(few), {}, _FEW),
    "nearly all": (
        saved(lambda state: {name: tensor for name, tensor in state.items() if name != "layer4.0.conv1.weight"}),
        {},
        r"at least 90% .* 125 tensors matched \(.* 89\.\d%\), 1 missing \(layer4.0.conv1.weight\)",
    ),
    "none": (saved(lambda _: {"a": torch.ones(2)}), {"init_partial": True}, r"must have some .* 0 tensors matched"),
    "not finite": (
        saved(lambda state: state | {"bn1.weight": state["bn1.weight"] / 0}),
        {},
        "must be finite, but bn1.weight are not",
    ),
    "another file": (saved(dict), {"init_sha256": "0" * 64}, f"must have the SHA-256 of init_sha256, {'0' * 64}, got"),
    "other kinds": (
        saved(lambda state: {name: tensor.to(torch.int8) for name, tensor in state.items()}),
        {"init_partial": True},
        r"conv1.weight \[\d+, 3, 7, 7\] of torch.int8 for \[",
    ),
}
"""Files that are written, changes of the configuration, and the message."""


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    save, changes, message = REFUSED[case]
    save(tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=message):
        read_initial_weights(configured(tmp_path / "weights.pt", changes=changes))


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar"])
@pytest.mark.parametrize("is_module", [False, True])
def test_file_with_a_class_is_refused_with_lines_that_save_its_weights(
    is_module: bool, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = randomized(narrow_resnet18())
    content = network if is_module else {"args": argparse.Namespace(lr=1), "state_dict": network.state_dict()}
    path = write(tmp_path / f"weights{suffix}", content)
    name = "byol_fast.models.narrow_resnet.NarrowResNet" if is_module else "argparse.Namespace"
    with pytest.raises(ConfigError, match=f"must hold tensors only, but holds the class {name},") as error:
        read_initial_weights(configured(path))
    monkeypatch.chdir(tmp_path)
    for line in str(error.value).splitlines()[1:]:
        exec(line, globals())
    model = initialized(configured("weights.pth"))
    torch.testing.assert_close(features(model.encoder), features(without_classifier(network)), rtol=0, atol=1e-6)


def test_partial_weights_are_loaded_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = randomized(narrow_resnet18())
    path = write(tmp_path / "weights.pt", few(network.state_dict()))
    config = configured(path, changes={"init_partial": True})
    model = initialized(config)
    torch.manual_seed(0)
    random = build_model(config)
    assert re.search(r"fits by only 0\.3%; parameters that it has not are random", caplog.text)
    state, expected = model.encoder.state_dict(), network.state_dict()
    assert torch.equal(state["bn1.running_mean"], expected["bn1.running_mean"])
    name = "layer4.1.conv2.weight"
    assert torch.equal(state[name], random.encoder.state_dict()[name])


@pytest.mark.parametrize("numbers", [False, True], ids=["names", "numbers"])
def test_weights_of_a_deeper_network_are_refused(numbers: bool, tmp_path: Path) -> None:
    """ResNet-34 has all tensors of ResNet-18, and 10.1 million parameters in further blocks: 11.2 of 21.3 match."""
    with torch.device("meta"):
        state = torchvision.models.resnet34().state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    path = write(tmp_path / "weights.pt", numbered(state) if numbers else state)
    first = "backbone.4.2.conv1.weight" if numbers else "layer1.2.conv1.weight"
    message = rf"11,176,512 of 11,176,512 parameters and 10,\d+,\d+ of further layers, 52\.5%.* \({first}"
    with pytest.raises(ConfigError, match=message):
        read_initial_weights(configured(path, "resnet18"))
    initial = read_initial_weights(configured(path, "resnet18", {"init_partial": True}))
    assert initial is not None and len(initial.encoder.tensors) == 120


@pytest.mark.parametrize("encoder", ["mobilenet_v3_small", "vit_b_16"])
def test_classifier_is_no_further_layer(encoder: str) -> None:
    """Also beside layers that the encoder keeps: 1.0 of 2.5 million parameters of a MobileNet are its classifier's."""
    with torch.device("meta"):
        state = torchvision.models.get_model(encoder).state_dict()
        match = match_weights(state, build_encoder(encoder, image_size=224))
    assert (match.share, match.num_further, len(match.unexpected)) == (1, 0, 2)


def test_shapes_that_differ_are_listed(tmp_path: Path) -> None:
    """As of a ResNet with the stem for small images, from weights for large ones."""
    path = write(tmp_path / "weights.pt", narrow_resnet18().state_dict())
    initial = read_initial_weights(configured(path, changes={"model.cifar_stem": True}))
    assert initial is not None
    assert "125 tensors matched" in initial.summary()
    assert re.search(r"0 missing, 2 unexpected \(fc.weight, fc.bias\), 1 of another shape \(conv1", initial.summary())
