"""README and docs: every snippet and command runs as printed, with stand-ins for the reader's files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

import byol_fast
from byol_fast import config as configs
from byol_fast.cli import main
from byol_fast.compat import guide
from byol_fast.config import recipes
from tests.conftest import real_data
from tests.documents import DOCUMENTS, STEPS, blocks, commands, shorten_runs, snippet, write_images, write_reader_files
from tests.photographs import made_photographs, real_photographs

SNIPPETS = {
    "torchvision": ("README.md", "import json, PIL.Image"),
    "pretrain": ("README.md", "result = byol_fast.pretrain"),
    "evaluate": ("evaluation.md", "result = byol_fast.evaluate.evaluate_linear"),
    "few shots and retrieval": ("evaluation.md", "result = byol_fast.evaluate.evaluate_knn"),
    "features": ("evaluation.md", "result = byol_fast.evaluate.embed_folder"),
    "CIFAR stem": ("export.md", "encoder.conv1"),
    "stem without ReLU": ("export.md", "encoder.relu"),
    "load_encoder": ("export.md", "import byol_fast, PIL.Image, torch"),
    "pretrain in docs": ("python_api.md", "result = byol_fast.pretrain"),
    "loop": ("python_api.md", "model = byol_fast.BYOL"),
    "hook": ("python_api.md", "optimizer = torch.optim.AdamW"),
    "use your encoder": ("python_api.md", "byol_fast.export.export_encoder("),
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


def run(name: str, **variables: Any) -> dict[str, Any]:
    """Execute a snippet as printed; return its variables.

    Args:
        name: of `SNIPPETS`.
        **variables: what the text around the snippet says is there already.
    """
    exec(snippet(*SNIPPETS[name]), variables)
    return variables


ASIDE = Path("runs/aside")
"""Place of `runs/first` while a page trains its own."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The working directory that the documents suppose: the reader's files, and `runs/first` by README's command."""
    (first,) = (words for document, words in commands() if document == "README.md" and "--name" in words)
    folder = tmp_path_factory.mktemp("reader")
    write_reader_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shorten_runs(patch)
        assert call(first) == 0
        yield


@pytest.fixture
def clean(reader: None) -> Iterator[None]:
    """That directory, without what the test leaves there."""
    yield
    if ASIDE.exists():
        shutil.rmtree("runs/first")
        ASIDE.rename("runs/first")
    for path in Path.cwd().iterdir():
        if path.name not in {"path", "photos", "photo.jpg", "runs"}:
            path.unlink()
    for path in Path("runs").iterdir():
        if path.name != "first":
            shutil.rmtree(path)


def call(words: list[str]) -> object:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    return stopped.value.code


# ------------------------------------------------------------------------------------------------------------ snippets


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("data", ["made", "imagenet_sample.tar"])
def test_encoder_in_torchvision_gives_the_features_of_embed(data: str, tmp_path: Path) -> None:
    """The crop of a photograph is compared, too: features of a barely trained network are all alike."""
    paths = made_photographs(tmp_path) if data == "made" else real_photographs(real_data(data), tmp_path)
    embedded = byol_fast.evaluate.embed_folder("runs/first", tmp_path, device="cpu", precision="fp32", threads=1)
    assert embedded.paths == tuple(path.name for path in paths)
    before = Path("photo.jpg").read_bytes()
    for path, features in zip(paths, torch.from_numpy(embedded.features), strict=True):
        shutil.copy(path, "photo.jpg")  # PIL looks at the content
        variables = run("torchvision")
        assert variables["x"].shape == (1, 3, 96, 96)
        assert torch.nn.functional.cosine_similarity(variables["features"], features, dim=1).item() > 1 - 1e-6, path
        torch.testing.assert_close(variables["features"][0], features, rtol=1e-4, atol=1e-4)
        loaded = run("load_encoder")
        torch.testing.assert_close(loaded["features"], variables["features"], rtol=1e-4, atol=1e-4)
        transform = byol_fast.EvalTransform(loaded["metadata"])
        torch.testing.assert_close(transform(Image.open(path))[None], variables["x"], rtol=0, atol=1e-6)
    Path("photo.jpg").write_bytes(before)


@pytest.mark.parametrize("name", ["resnet18", "resnet18_lightly"])
def test_cifar_stem_accepts_its_weights(name: str) -> None:
    """The encoder is that of the README, before its weights are loaded."""
    stem = byol_fast.models.build_encoder(name, image_size=32, cifar_stem=True).eval()
    plain = torchvision.models.resnet18().eval()
    plain.fc = torch.nn.Identity()
    run("CIFAR stem", torch=torch, encoder=plain)
    plain.load_state_dict(stem.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), stem(images)) == (name == "resnet18")
    if name == "resnet18_lightly":
        run("stem without ReLU", torch=torch, encoder=plain)
        assert torch.equal(plain(images), stem(images))


@pytest.mark.usefixtures("clean")
def test_pretrain_returns_an_encoder() -> None:
    variables = run("pretrain")
    assert variables["encoder"](torch.zeros(2, 3, 32, 32)).shape == (2, variables["metadata"]["feature_dim"])
    assert configs.load(variables["result"].run_dir / "config.json").optim.lr == 0.3


@pytest.mark.usefixtures("clean")
def test_pretrain_prints_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("pretrain in docs")["result"]
    assert result.steps == STEPS
    assert f"{result.loss} {result.encoder}" in capsys.readouterr().out


@pytest.mark.usefixtures("clean")
def test_evaluation_returns_accuracy_and_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("evaluate")["result"]
    assert 0 <= result.top1 <= 1
    assert len(result.baselines) == 2
    assert str(result.top1) in capsys.readouterr().out


@pytest.mark.usefixtures("clean")
def test_few_shots_and_retrieval_print_their_results(capsys: pytest.CaptureFixture[str]) -> None:
    variables = run("few shots and retrieval")
    assert [row.shots for row in variables["result"].shots] == [1, 5]
    assert variables["retrieval"].scores.num_queries == 8
    printed = capsys.readouterr().out
    assert f"5 {variables['row'].top1} " in printed
    assert str(variables["retrieval"].scores.mean_ap) in printed


@pytest.mark.usefixtures("clean")
def test_most_similar_image_is_the_image_itself() -> None:
    variables = run("features")
    assert variables["result"].features.shape == (24, 512)
    assert variables["rows"][:, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(variables["similarities"][:, 0], torch.ones(3))


@pytest.mark.usefixtures("clean")
def test_early_stopping_ends_and_exports() -> None:
    callback = run("early stopping")["EarlyStopping"]()
    (run_dir,) = (path for path in Path("runs").iterdir() if path.name != "first")
    # Without validation images there is nothing to stop for.
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == STEPS
    # Every validation image is among the training images and its own neighbor: accuracy 1 at every evaluation.
    images = Path("path/to/images")
    changes = {"name": "stopped", "data.root": images, "knn": {"val_root": images, "every_epochs": 1, "k": 1}}
    config = configs.replace(recipes.imagenet_resnet50(100), changes)
    result = byol_fast.Trainer(config, callbacks=[callback]).fit()
    assert result.steps == 3  # one epoch: the evaluation before the first step does not count
    assert result.encoder.exists()


@pytest.mark.usefixtures("clean")
def test_own_tracker_writes_the_metrics() -> None:
    tracker = run("tracker")["CSVTracker"]()
    (run_dir,) = (path for path in Path("runs").iterdir() if path.name != "first")
    images = Path("path/to/images")
    config = configs.replace(recipes.imagenet_resnet50(100), {"data.root": images, "knn.val_root": images, "knn.k": 1})
    evaluated = byol_fast.Trainer(config, callbacks=[byol_fast.TrackerCallback([tracker])]).fit().run_dir
    for folder, name in ((run_dir, "train/loss"), (evaluated, "eval/rankme")):
        lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        key = name.partition("/")[2]
        recorded = {record["step"]: record[key] for record in records if key in record}
        assert {int(step): float(value) for step, logged, value in lines if logged == name} == recorded
        assert recorded


class AtEveryStep(byol_fast.Callback):
    """Calls a callback as if each step were the hundredth after the one before."""

    def __init__(self, callback: byol_fast.Callback) -> None:
        self.callback = callback

    def on_step_end(self, trainer: Any, output: Any) -> None:
        step = SimpleNamespace(step=100 * trainer.state.step)
        self.callback.on_step_end(SimpleNamespace(state=step), output)  # type: ignore[arg-type]


@pytest.mark.usefixtures("clean")
def test_callback_prints_the_loss_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    callback = run("print loss")["PrintLoss"]()
    changes = {"name": "printing", "data.root": Path("path/to/images"), "probe.enabled": "off"}
    config = configs.replace(recipes.imagenet_resnet50(100), changes)
    byol_fast.Trainer(config, callbacks=[AtEveryStep(callback)]).fit()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    records = [json.loads(line) for line in Path("runs/printing/metrics.jsonl").read_text().splitlines()]
    assert len(records) == STEPS
    for record in records:
        values = [100 * record["step"], *(record[name] for name in ("loss", "embedding_std", "lr", "tau"))]
        assert [str(value) for value in values] in printed


def test_roofline_counts_a_step() -> None:
    result = run("roofline")["result"]
    assert result.total("B").bytes < result.total("A").bytes


def test_kernels_replace_plain_pytorch() -> None:
    torch.manual_seed(0)
    variables = run("kernels")
    torch.manual_seed(0)  # the weights before the steps
    online, target = torch.nn.Linear(128, 256), torch.nn.Linear(128, 256)
    view1, view2 = torch.randn(2, 64, 128)
    cos = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        both = 4 - 2 * cos(online(view1), target(view2)) - 2 * cos(online(view2), target(view1))
    torch.testing.assert_close(variables["loss"], both.mean())
    # ema_update_ moved the target towards the first online weights, LARS.step towards the later ones.
    tau = variables["tau"]
    after = variables["online"].parameters(), variables["target"].parameters()
    for t, o, later, moved in zip(target.parameters(), online.parameters(), *after, strict=True):
        torch.testing.assert_close(moved, tau * (tau * t + (1 - tau) * o) + (1 - tau) * later)
    row = int((variables["flip"] & ~variables["jitter"] & ~variables["gray"]).nonzero()[0])
    F = torchvision.transforms.functional
    expected = F.normalize(F.hflip(variables["images"][row]) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # rounded to bfloat16
    torch.testing.assert_close(variables["views"][row].float(), expected, rtol=2**-8, atol=0)


def test_lightly_drop_ins_transform_and_compare() -> None:
    variables = run("lightly")
    view1, view2 = variables["transform"](Image.new("RGB", (50, 40)))
    assert view1.shape == view2.shape == (3, 224, 224)
    x = torch.randn(4, 8)
    torch.testing.assert_close(variables["criterion"](x, x), torch.tensor(-1.0))


def test_guide_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of two images of a folder instead of CIFAR-10, and no pre-trained weights, which would be downloaded."""
    write_images(tmp_path, count=2, size=(32, 32))
    monkeypatch.setenv("BYOL_FAST_DATA", str(tmp_path))
    monkeypatch.setattr(guide.train_byol, "__defaults__", (1, 0.001))
    resnet18 = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: resnet18())
    variables = run("guide")
    assert isinstance(variables["model"], variables["BYOL"])
    losses = guide.train_byol(variables["model"], guide.load_data())
    assert len(losses) == 1


# ------------------------------------------------------------------------------------------------------------ commands

PARSED_ONLY = {
    "train imagenet_resnet50 path/to/images --batch-size 512": "several GPUs",
    "train imagenet_resnet50 /data/imagenet": "several machines",
    "train imagenet_resnet50_100 path/to/images --log tensorboard wandb mlflow": "needs wandb, mlflow and a network",
    "bench": "takes ten minutes with the other libraries; `compare` needs two results of it",
}
"""Beginnings of commands that are only compared with the parser, and why."""
SLOW = ("profile",)
"""Beginnings of commands that take more than ten CPU-seconds."""


def selected(*, slow: bool) -> list[Any]:
    """Documents and the commands in them that are run, in order; each command once."""
    result: dict[str, list[list[str]]] = {}
    seen: set[str] = set()
    for document, words in commands():
        line = " ".join(words)
        if line not in seen and not line.startswith(tuple(PARSED_ONLY)) and line.startswith(SLOW) == slow:
            result.setdefault(document, []).append(words)
        seen.add(line)
    return [pytest.param(lines, id=document, marks=[pytest.mark.slow] * slow) for document, lines in result.items()]


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("lines", [*selected(slow=False), *selected(slow=True)])
def test_commands_of_a_page_succeed(lines: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as printed."""
    for words in lines:
        if "--name" in words:  # other settings for the same run: the reader takes one of them
            shutil.rmtree("runs/first") if ASIDE.exists() else Path("runs/first").rename(ASIDE)
        code = call(words)
        output = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}: {output.out}{output.err}"


@pytest.mark.parametrize(("document", "words"), [pytest.param(d, w, id=" ".join(w)[:60]) for d, w in commands()])
def test_command_parses(
    document: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser refuses only an option that is added here: all others, and their values, are right."""
    monkeypatch.setenv("COLUMNS", "200")
    assert call([*words, "--no-such-option"]) == 2
    errors = capsys.readouterr().err
    refused = re.search(r"Unrecognized options?: ([^\n│]*)", errors)
    assert refused is not None and refused[1].strip() == "--no-such-option", f"{document}: {errors}"


def test_commands_that_are_only_parsed_exist() -> None:
    lines = [" ".join(words) for _, words in commands()]
    assert not [begin for begin in (*PARSED_ONLY, *SLOW) if not any(line.startswith(begin) for line in lines)]
