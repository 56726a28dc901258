"""The items of the GPU queue, rehearsed on the CPU; all of them only in slow runs."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu.item import Context, Item
from benchmarks.gpu.items import ITEMS, cifar, common, gpu_tests, observe
from benchmarks.gpu.items.timing import figures, interleaved
from byol_fast.bench.speed_log import read_log
from byol_fast.bench.timing import Timing
from byol_fast.profiling import inductor

ROOT = Path(__file__).parents[2]
BY_NAME = {item.name: item for item in ITEMS}


@pytest.fixture(autouse=True)
def _restore_backend_flags() -> Iterator[None]:
    """Restore the process-wide flags set by items, as the queue's worker does."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


def make_context(item: Item, folder: Path, *, seconds: float = 600) -> Context:
    return Context(
        item,
        folder / "records.jsonl",
        folder,
        device="cpu",
        rehearsal=True,
        deadline=time.monotonic() + seconds,
    )


def rehearse(item: Item, folder: Path) -> dict[str, dict[str, Any]]:
    """Run an item on the CPU and return its figures by name; no check may fail."""
    context = make_context(item, folder)
    module, _, function = item.run.partition(":")
    assert getattr(importlib.import_module(module), function)(context) is None
    by_name = figures_in(context)
    failed = [name for name, figure in by_name.items() if not figure.get("ok", True)]
    assert by_name and not failed
    return by_name


def figures_in(context: Context) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in context.records.read_text().splitlines()]
    by_name = {record["figure"]: record for record in records}
    assert len(by_name) == len(records), "names of figures are unique"
    return by_name


# ------------------------------------------------------------------------------------------------ the list


def test_items_are_well_formed() -> None:
    assert len(BY_NAME) == len(ITEMS) == 14
    for item in ITEMS:
        assert re.fullmatch(r"\w+", item.name) and item.question.endswith("?")
        module, _, function = item.run.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert [path for path in item.depends_on if not (ROOT / path).exists()] == []
        assert 8 < (item.first_figure or item.seconds) <= item.seconds


def test_importing_items_imports_neither_torch_nor_the_package() -> None:
    code = "import sys, benchmarks.gpu.items; print({'torch', 'numpy', 'byol_fast', 'byol_kernels'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------ rehearsals


def test_eager_step_is_rehearsed(tmp_path: Path) -> None:
    by_name = rehearse(BY_NAME["resnet50_eager"], tmp_path)
    names = [
        f"{candidate}, eager, batch 4, cudnn.benchmark {state}"
        for candidate in ("baseline", "byol_fast")
        for state in ("off", "on")
    ]
    assert all(by_name[name]["images_per_second"] > 0 for name in names)
    flags = [by_name[name]["flags"] for name in names]
    assert flags[:2] == flags[2:] and flags[0].endswith("benchmark off") and flags[1].endswith("benchmark on")


def test_cifar_speed_is_rehearsed(tmp_path: Path) -> None:
    by_name = rehearse(BY_NAME["resnet18_cifar"], tmp_path)
    for mode in ("eager", "graph"):
        for views in ("ready views", "device cache"):
            assert by_name[f"byol_fast, {mode}, {views}, batch 4"]["images_per_second"] > 0


@pytest.fixture
def archive(tmp_path: Path, photos: np.ndarray) -> Path:
    """Sixty JPEG files of three classes, in folders like those of CIFAR-10."""
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for number, image in enumerate(photos):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG")
            part = "train" if number % 4 else "test"
            member = tarfile.TarInfo(f"{part}/{'abc'[number % 3]}/{number:04d}.jpg")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return path


def test_archive_is_unpacked_up_to_a_number_of_images(archive: Path, tmp_path: Path) -> None:
    cifar.unpack(archive, tmp_path / "some", most=4)
    cifar.unpack(archive, tmp_path / "all")
    counts = [len(list((tmp_path / name).glob("t*/?/*.jpg"))) for name in ("some", "all")]
    assert counts == [4 * 6, 60]


def test_cifar_recipe_is_rehearsed(archive: Path, tmp_path: Path) -> None:
    by_name = rehearse(replace(BY_NAME["cifar10_recipe"], files=(str(archive),)), tmp_path)
    training = by_name["training"]
    assert (training["steps"], training["epochs"], training["planned_epochs"]) == (4, 2.0, 2)
    assert training["images_per_second"] > 0 and 0 <= training["knn_200_top1"] <= 1
    log = read_log(tmp_path / "cifar10_fast-seed0.jsonl")
    assert (log.header["images"]["train"], log.header["images"]["val"]) == (45, 15)
    assert [line["step"] for line in log.evaluations] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", [item.name for item in ITEMS if not item.not_rehearsed and not item.files])
def test_all_items_are_rehearsed(name: str, tmp_path: Path) -> None:
    rehearse(BY_NAME[name], tmp_path)


@pytest.mark.slow
def test_every_gpu_test_belongs_to_a_group(tmp_path: Path) -> None:
    """The search for files by their text finds all that pytest collects."""
    (tmp_path / "listing.py").write_text(
        "import json, os\n"
        "def pytest_collection_finish(session):\n"
        "    by_name = [(i.nodeid.split('::')[0], i.get_closest_marker('gpu').args[0]) for i in session.items]\n"
        "    open(os.environ['LISTING'], 'w').write(json.dumps(by_name))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": paths, "LISTING": str(tmp_path / "listing.json")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "listing", "tests"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    listed = {tuple(entry) for entry in json.loads((tmp_path / "listing.json").read_text())}
    covered = {(path, group.capability) for group in gpu_tests.groups(small=False) for path in group.paths}
    assert listed and not listed - covered


# ------------------------------------------------------------------------------------------------ what they share


def test_nan_fails_a_check_except_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(BY_NAME["smoke"], tmp_path)
    checks = common.Checks(context)
    assert checks("equal", 0.0, 0.0) and checks.problem() is None
    assert not checks("NaN", math.nan, 1.0)
    monkeypatch.setattr(common, "DRY", True)
    assert checks("NaN in a dry run", math.nan, 1.0)
    assert checks.problem() == "failed checks: NaN: error nan, allowed 1"
    with common.skip_value_errors(context, "a value"):
        raise ValueError("garbage")
    assert [figure["ok"] for figure in figures_in(context).values()] == [True, False, False, False]


def test_rounds_stop_at_the_deadline(tmp_path: Path) -> None:
    context = make_context(BY_NAME["kernels"], tmp_path, seconds=0)
    context.rehearsal = False
    timings = interleaved(context, {"a": lambda: None, "b": lambda: sum(range(10_000))}, rounds=100)
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_figures_are_divided_by_repeats() -> None:
    by_name = figures(Timing((0.1, 0.2, 0.4)), images=100, repeats=10)
    assert by_name == {"ms": 20.0, "ms_p20": 14.0, "ms_p80": 32.0, "rounds": 3, "images_per_second": 500.0}


def test_kernel_pattern_matches_the_heaviest_kernels(tmp_path: Path) -> None:
    assert re.match(observe.kernel_pattern(tmp_path / "none.json"), "triton_poi_fused_relu_5")
    kernels = [
        "Memcpy DtoD",
        "void cudnn::bn_fw_tr<float, int>(cudnnTensor)",
        "triton_red_fused_mul_7",
        "nvjet_hsh_64x8",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>(at::native::(anonymous namespace)::X)",
    ]
    (tmp_path / "kernels.json").write_text(json.dumps([{"kernel": name} for name in kernels]))
    pattern = observe.kernel_pattern(tmp_path / "kernels.json")
    names = ["bn_fw_tr", "triton_red_fused_mul_7", "nvjet_hsh_64x8", "_lars_apply_kernel", "CatArrayBatchedCopy"]
    assert all(re.match(pattern, name) for name in names)
    assert not re.match(pattern, "triton_red_fused_mul_71") and not re.match(pattern, "Memcpy")


def test_ncu_output_is_recorded(tmp_path: Path) -> None:
    metrics = inductor.NCU_METRICS
    header = '"ID","Process ID","Kernel Name",' + ",".join(f'"{metric}"' for metric in metrics)
    rows = [
        header,
        '"","","","byte","byte","ns","%"',
        '"0","7","triton_poi_5","3,000,000","1,000,000","2,000","40"',
        '"1","7","triton_poi_5","3,000,000","1,000,000","2,000","60"',
    ]
    context = make_context(BY_NAME["ncu"], tmp_path)
    observe.record_kernels(context, "\n".join(["==PROF== Connected", *rows]), "")
    kernel = figures_in(context)["ncu: triton_poi_5"]
    assert (kernel["launches"], kernel["read_gb"], kernel["written_gb"]) == (2, 0.006, 0.002)
    assert (kernel["gb_per_s"], kernel["occupancy_percent"]) == (2000, 50)
    with pytest.raises(RuntimeError, match="no table"):
        observe.record_kernels(context, "==ERROR==", "exit code 1")
