"""README and docs: every Python snippet runs, every command parses, every option and link exists."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import byol_fast
from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.config import Config, recipes
from tests.conftest import real_data
from tests.photographs import made_photographs, real_photographs

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(document: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(DOCUMENTS[document]) if kind == language]


def snippet(document: str, line: str) -> str:
    """The only Python block of a document with a line that begins so."""
    (text,) = (t for t in blocks(document, "python") if re.search(f"^{re.escape(line)}", t, re.MULTILINE))
    return text


SNIPPETS = {
    "torchvision": ("README.md", "import json, PIL.Image"),
    "pretrain": ("README.md", "result = byol_fast.pretrain"),
    "evaluate": ("evaluation.md", "result = byol_fast.evaluate.evaluate_linear"),
    "features": ("evaluation.md", "result = byol_fast.evaluate.embed_folder"),
    "CIFAR stem": ("export.md", "encoder.conv1"),
    "load_encoder": ("export.md", "import byol_fast, PIL.Image, torch"),
    "pretrain in docs": ("python_api.md", "result = byol_fast.pretrain"),
    "loop": ("python_api.md", "model = byol_fast.BYOL"),
    "hook": ("python_api.md", "optimizer = torch.optim.AdamW"),
    "Lightning": ("python_api.md", "class Learner"),
    "early stopping": ("python_api.md", "class EarlyStopping"),
    "tracker": ("trackers.md", "class CSVTracker"),
    "print loss": ("python_api.md", "class PrintLoss"),
    "roofline": ("profiling.md", "from byol_fast.profiling import roofline"),
    "kernels": ("kernels.md", "from byol_kernels import"),
    "lightly": ("drop_ins.md", "from byol_fast.compat.lightly import"),
    "guide": ("drop_ins.md", "from byol_fast.compat.guide import"),
}


def test_every_python_snippet_is_tested() -> None:
    in_documents = [text for document in DOCUMENTS for text in blocks(document, "python")]
    assert sorted(in_documents) == sorted(snippet(*of) for of in SNIPPETS.values())
    source = "".join(Path(__file__).with_name(name).read_text() for name in ("test_examples.py", "test_own_loops.py"))
    assert not [name for name in SNIPPETS if not re.search(rf'run\(\s*"{name}"', source)]


def run(name: str, replacements: dict[str, str] | None = None, **variables: Any) -> dict[str, Any]:
    """Execute a snippet, with some of its text replaced; return its variables."""
    text = snippet(*SNIPPETS[name])
    for old, new in (replacements or {}).items():
        assert old in text
        text = text.replace(old, new)
    exec(text, variables)
    return variables


def images(folder: Path, *, classes: str, count: int, seed: int) -> None:
    pixels = torch.rand(count, 12, 12, 3, generator=torch.Generator().manual_seed(seed))
    for i, image in enumerate((pixels * 255).byte().numpy()):
        path = folder / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((40, 36), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def config() -> Config:
    """A run of two steps in the folder of the documents' examples."""
    return configs.replace(
        recipes.imagenet_resnet50(100),
        {
            "data": {"root": Path("path/to/images"), "threads": 1},
            "model": {"encoder": "resnet18", "hidden_dim": 32, "projection_dim": 16},
            "view1.size": 32,
            "view2.size": 32,
            "batch_size": 8,
            "steps": 2,
            "log_every": 1,
            "device": "cpu",
            "precision": "fp32",
            "log": (),
            "memory_check": False,
            "name": "first",
        },
    )


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory that the documents suppose: images, a photo, and the finished run runs/first."""
    path = tmp_path_factory.mktemp("examples")
    images(path / "path/to/images/train", classes="ab", count=16, seed=0)
    images(path / "path/to/images/val", classes="ab", count=8, seed=1)
    Image.fromarray(np.full((120, 130, 3), 90, np.uint8)).save(path / "photo.jpg")
    before = Path.cwd()
    os.chdir(path)
    byol_fast.Trainer(config).fit()
    yield path
    os.chdir(before)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("data", ["made", "imagenet_sample.tar"])
def test_encoder_in_torchvision_gives_the_features_of_embed(data: str, tmp_path: Path) -> None:
    """The crop of a photograph is compared, too: features of a barely trained network are all alike."""
    paths = made_photographs(tmp_path) if data == "made" else real_photographs(real_data(data), tmp_path)
    embedded = byol_fast.evaluate.embed_folder("runs/first", tmp_path, device="cpu", precision="fp32", threads=1)
    assert embedded.paths == tuple(path.name for path in paths)
    for path, features in zip(paths, torch.from_numpy(embedded.features), strict=True):
        shutil.copy(path, "photo.jpg")  # PIL looks at the content
        variables = run("torchvision")
        assert torch.nn.functional.cosine_similarity(variables["features"], features, dim=1).item() > 1 - 1e-6, path
        torch.testing.assert_close(variables["features"][0], features, rtol=1e-4, atol=1e-4)
        loaded = run("load_encoder")
        torch.testing.assert_close(loaded["features"], variables["features"], rtol=1e-4, atol=1e-4)
        transform = byol_fast.EvalTransform(loaded["metadata"])
        torch.testing.assert_close(transform(Image.open(path))[None], variables["x"], rtol=0, atol=1e-6)


def test_cifar_stem_accepts_its_weights() -> None:
    stem = byol_fast.models.build_encoder("resnet18", image_size=32, cifar_stem=True)
    plain = torchvision.models.resnet18()
    plain.fc = torch.nn.Identity()
    run("CIFAR stem", torch=torch, encoder=plain)
    plain.load_state_dict(stem.state_dict())


@pytest.mark.usefixtures("folder")
def test_pretrain_returns_an_encoder(config: Config) -> None:
    small = {'"imagenet_resnet50_100", batch_size=128': "config, batch_size=4"}
    variables = run("pretrain", small, config=configs.replace(config, {"name": "pretrained", "optim.lr": 1.0}))
    assert variables["encoder"](torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    stored = configs.load(Path("runs/pretrained/config.json"))
    assert (stored.batch_size, stored.optim.lr) == (4, 0.3)


@pytest.mark.usefixtures("folder")
def test_pretrain_prints_its_result(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    small = {'"imagenet_resnet50_100", batch_size=128': "config, batch_size=4"}
    result = run("pretrain in docs", small, config=configs.replace(config, {"name": "printed"}))["result"]
    assert f"{result.loss} {result.encoder}" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_evaluation_returns_accuracy_and_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    folders = {part: f"path/to/images/{part}" for part in ("train", "val")}
    result = run("evaluate", byol_fast=byol_fast, train=folders["train"], test=folders["val"])["result"]
    assert 0 <= result.top1 <= 1
    assert len(result.baselines) == 2
    assert str(result.top1) in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_most_similar_image_is_the_image_itself() -> None:
    variables = run("features", byol_fast=byol_fast)
    assert variables["result"].features.shape == (24, 512)
    assert variables["rows"][:, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(variables["similarities"][:, 0], torch.ones(3))


@pytest.mark.usefixtures("folder")
def test_early_stopping_ends_and_exports(config: Config) -> None:
    # Every validation image is among the training images and its own neighbor: accuracy 1 at every evaluation.
    changes = {"name": "stopped", "knn": {"val_root": Path("path/to/images/train"), "every_epochs": 1, "k": 1}}
    long = configs.replace(config, {"steps": 20, "data.root": Path("path/to/images/train"), **changes})
    small = {'"imagenet_resnet50_100"': "config", "byol_fast.pretrain": "result = byol_fast.pretrain"}
    result = run(
        "early stopping", {**small, "path/to/images": "path/to/images/train"}, byol_fast=byol_fast, config=long
    )
    assert result["result"].steps == 2  # one epoch: the evaluation before the first step does not count
    assert result["result"].encoder.exists()


@pytest.mark.usefixtures("folder")
def test_own_tracker_writes_the_metrics(config: Config) -> None:
    small = {'"imagenet_resnet50_100"': "config"}
    run("tracker", small, byol_fast=byol_fast, config=configs.replace(config, {"name": "tracked", "knn.k": 1}))
    lines = [line.split(",") for line in Path("runs/tracked/metrics.csv").read_text().splitlines()]
    values = {(int(step), name): float(value) for step, name, value in lines}
    records = [json.loads(line) for line in Path("runs/tracked/metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "eval/rankme"):
        key = name.partition("/")[2]
        recorded = {record["step"]: record[key] for record in records if key in record}
        assert {step: value for (step, logged), value in values.items() if logged == name} == recorded


@pytest.mark.usefixtures("folder")
def test_callback_prints_the_loss_of_the_records(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    callback = run("print loss", {"100": "1"}, byol_fast=byol_fast)["PrintLoss"]()
    quiet = configs.replace(config, {"name": "printing", "knn.enabled": "off", "probe.enabled": "off"})
    byol_fast.Trainer(quiet, callbacks=[callback]).fit()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    records = [eval(line) for line in Path("runs/printing/metrics.jsonl").read_text().splitlines()]
    for record in records:
        values = [record[name] for name in ("step", "loss", "embedding_std", "lr", "tau")]
        assert [str(value) for value in values] in printed


def test_roofline_counts_a_step() -> None:
    result = run("roofline", {'"resnet18"': '"resnet18", batch_size=4, image_size=32'})["result"]
    assert result.total("B").bytes < result.total("A").bytes


def test_kernels_replace_plain_pytorch() -> None:
    torch.manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(6, 8) for _ in range(4))
    online, target = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    online(torch.ones(1, 3)).sum().backward()
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in (("o", online), ("t", target))}
    photos = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.tensor([True, False])
    factors, order = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(2, 1), torch.arange(4).repeat(2, 1)
    variables = run(
        "kernels", p1=p1, p2=p2, z1=z1, z2=z2, online=online, target=target, tau=0.9,
        images_uint8=photos, factors=factors, order=order, flip=mask, jitter=mask, gray=mask,
    )  # fmt: skip
    cos = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(variables["loss"], (4 - 2 * cos(p1, z2) - 2 * cos(p2, z1)).mean())
    # ema_update_ moved the target towards the first online weights, LARS.step towards the later ones.
    expected = [
        0.9 * (0.9 * t + 0.1 * o) + 0.1 * later
        for t, o, later in zip(before["t"], before["o"], online.parameters(), strict=True)
    ]
    torch.testing.assert_close(list(target.parameters()), expected)
    second = torchvision.transforms.functional.normalize(photos[1] / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(variables["views"][1].float(), second, rtol=2**-8, atol=0)  # rounded to bfloat16


def test_lightly_drop_ins_transform_and_compare() -> None:
    variables = run("lightly")
    view1, view2 = variables["transform"](Image.new("RGB", (50, 40)))
    assert view1.shape == view2.shape == (3, 224, 224)
    x = torch.randn(4, 8)
    torch.testing.assert_close(variables["criterion"](x, x), torch.tensor(-1.0))


def test_guide_script_trains() -> None:
    small = {'weights="DEFAULT"': "", "load_data())": "loader, num_epochs=1)"}
    batch = (torch.zeros(2, 3, 32, 32), torch.zeros(2))
    variables = run("guide", small, torch=torch, torchvision=torchvision, loader=[batch])
    assert isinstance(variables["model"], variables["BYOL"])


# ---------------------------------------------------------------------------------------- commands


def commands() -> list[tuple[str, list[str]]]:
    """Document and arguments of every byol-fast command in the code blocks, started directly or by torchrun."""
    result = []
    for document in DOCUMENTS:
        for text in blocks(document, ""):
            for line in text.replace("\\\n", " ").splitlines():
                match = re.match(r"byol-fast (.*)|.*torchrun .* -m byol_fast (.*)", line)
                if match and "RECIPE" not in line:
                    result.append((document, shlex.split(match[1] or match[2], comments=True)))
    return result


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("document", "words"), [pytest.param(d, w, id=f"{d}: {' '.join(w)[:60]}") for d, w in commands()]
)
def test_command_parses(
    document: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser refuses only an option that is added here: all others, and their values, are right."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main.main([*words, "--no-such-option"])
    errors = capsys.readouterr().err
    refused = re.search(r"Unrecognized options?: ([^\n│]*)", errors)
    assert stopped.value.code == 2
    assert refused is not None and refused[1].strip() == "--no-such-option", f"{document}: {errors}"


HELP = [
    ["train", "imagenet_resnet50"], ["profile", "demo"], ["preview", "demo"], ["roofline", "demo"], ["doctor"],
    ["export"], ["eval", "knn"], ["eval", "linear"], ["eval", "finetune"], ["embed"], ["report"], ["bench"],
]  # fmt: skip
KNOWN = {"--resume", "--help"}
"""Options that no help text lists."""
OTHER_PROGRAMS = ("tar ",)
"""Beginnings of inline code whose options are not ours."""


def test_options_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    known = set(KNOWN)
    for words in HELP:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            main.main([*words, "--help"])
        known |= set(re.findall(r"--[\w.-]+", output.getvalue()))
    unknown = {}
    for document, text in DOCUMENTS.items():
        spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
        inline = " ".join(span for span in spans if not span.startswith(OTHER_PROGRAMS))
        options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", inline))
        if document != "gpu.md" and options - known:  # gpu.md has other programs' options
            unknown[document] = options - known
    assert not unknown


def test_make_targets_exist() -> None:
    targets = {
        t for text in DOCUMENTS.values() for t in re.findall(r"`?make ((?:test-)?[a-z]+)\b(?=`| [A-Z]|\n)", text)
    }
    assert {"demo", "gpu", "bench", "test-peers"} <= targets
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined


def test_links_and_paths_exist() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        for file, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(#[^)]*)?\)", text):
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name}: {file}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor[1:] in anchors, f"{path.name}: {file}{anchor}"
        for name in re.findall(r"`([\w/]+/[\w.]*\.(?:py|md|json|txt)|(?:tests|benchmarks|byol_fast)/[\w/.]*)`", text):
            places = (ROOT, ROOT / "byol_fast", ROOT / "kernels")
            generated = name.startswith(("runs/", "benchmarks/results/GPU"))
            assert generated or any((place / name).exists() for place in places), f"{path.name}: {name}"


def test_every_command_is_described() -> None:
    text = " ".join(DOCUMENTS.values())
    assert not [name for name in main.COMMANDS if name != "demo" and f"byol-fast {name}" not in text]
