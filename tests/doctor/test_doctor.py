"""`byol-fast doctor`: checks of described machines, of this machine, and of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_fast import config as configs
from byol_fast.cli.main import main as cli
from byol_fast.config import Config, DataConfig
from byol_fast.data import SourceError, open_source, open_train_val
from byol_fast.doctor.checks import Check, run_checks
from byol_fast.doctor.main import Options, ScanData, main, scan_data
from byol_fast.doctor.scan import scan
from byol_fast.doctor.system_info import SystemInfo, run_probes
from byol_fast.training.knn_monitor import knn_problem
from byol_fast.utils.env import version
from byol_fast.utils.output import PlainConsole
from tests.data.corrupt_files import CORRUPT, JPEG, fill
from tests.data.kinds import available, make, write_tar
from tests.data.test_resume import pictures, with_one_corrupt

GPU = SystemInfo(
    python=(3, 12),
    system="Linux x86_64",
    torch="2.15.0+cu132",
    torch_cuda="13.2",
    torchvision="0.29.2",
    triton="3.9.0",
    gpus=["NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0"],
    driver="580.65.06",
    dali="nvidia-dali-cuda130==2.4.0",
    probes={"kernels": "ok", "dali": "ok", "dali on the GPU": "ok"},
    compiler="/usr/bin/gcc",
    cpu="Xeon",
    cpus=16,
    torch_threads=8,
    memory_gib=100.0,
    shm_gib=50.0,
    disk_gib=1000.0,
    open_files=65536,
    optional={"tensorboard": "2.21.0", "timm": None},
)
CPU = replace(GPU, gpus=[], driver=None, torch_threads=16, probes={"kernels": "ok", "dali": "ok"}, bf16=True)


def by_name(info: SystemInfo) -> dict[str, Check]:
    checks = run_checks(info)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.advice for check in checks if check.status != "ok")  # every problem has a remedy
    return {check.name: check for check in checks}


@pytest.mark.parametrize("info", [GPU, CPU], ids=["GPU", "CPU"])
def test_complete_machine_has_no_problems(info: SystemInfo) -> None:
    checks = by_name(info)
    assert {name for name, check in checks.items() if check.status != "ok"} == (set() if info.gpus else {"GPU"})
    assert checks["GPU"].status in {"ok", "note"}


@pytest.mark.parametrize(
    ("base", "changes", "name", "status", "text"),
    [
        (GPU, {"driver": "550.54"}, "driver", "broken", "nvidia-dali-cuda130==2.4.0 requires 580"),
        (GPU, {"driver": "550.54", "dali": "nvidia-dali-cuda120==2.4.0"}, "driver", "broken", "torch requires 580"),
        (GPU, {"driver": "550.54", "dali": "nvidia-dali-cuda120==2", "torch_cuda": "12.8"}, "driver", "ok", "550.54"),
        (GPU, {"gpus": [], "torch_cuda": None}, "GPU", "broken", "but torch was built without CUDA"),
        (GPU, {"gpus": [], "probes": {"cuda": "RuntimeError: no"}}, "GPU", "broken", "but RuntimeError: no"),
        (GPU, {"dali": None}, "DALI", "note", "the GPU would wait"),
        (CPU, {"dali": None}, "DALI", "note", "torchvision decodes instead"),
        (CPU, {"dali": None, "system": "Linux x86_64"}, "DALI", "note", "pip install nvidia-dali-cuda130"),
        (GPU, {"dali": None, "driver": "550.54"}, "DALI", "note", "pip install nvidia-dali-cuda120"),
        (GPU, {"probes": {"kernels": "ok", "dali": "ImportError: x"}}, "DALI", "broken", "--data.loader threaded"),
        (CPU, {"probes": {"kernels": "ok", "dali": "ImportError: x"}}, "DALI", "note", "--data.loader threaded"),
        (GPU, {"probes": {"kernels": "ok", "dali": "ok", "dali on the GPU": "no"}}, "DALI on the GPU", "broken", "no"),
        (GPU, {"probes": {"kernels": "CompilationError: gcc"}}, "kernels", "broken", "CompilationError: gcc"),
        (GPU, {"compiler": None}, "C compiler", "broken", "apt install gcc"),
        (CPU, {"compiler": None}, "C compiler", "note", "--mode compile is not available"),
        (CPU, {"torch": None, "probes": {"torch": "OSError: libtorch"}}, "torch", "broken", "OSError: libtorch"),
        (CPU, {"torch": "2.9.1"}, "torch", "broken", "pip install 'torch>=2.11'"),
        (CPU, {"torch": "2.11.0"}, "torch", "ok", "2.11.0"),
        (CPU, {"torchvision": None}, "torchvision", "broken", "install the version for torch 2.15.0"),
        (CPU, {"python": (3, 13)}, "Python", "note", "3.13"),
        (CPU, {"cpu_quota": 3.5}, "CPU", "note", "may use only 3.5"),
        (CPU, {"cpu_quota": 3.5}, "CPU", "note", "--data.threads 4"),
        (GPU, {"cpus": 2}, "CPU", "note", "2 cores for this process for 1 GPUs"),
        (CPU, {"torch_threads": 1}, "threads", "note", "1 of 16 cores"),
        (CPU, {"torch_threads": 7}, "threads", "note", "7 of 16 cores"),
        (CPU, {"torch_threads": 8}, "threads", "ok", "8"),  # torch's default for hyperthreads
        (CPU, {"torch_threads": 1, "cpus": 1}, "threads", "ok", "1"),
        (CPU, {"torch_threads": 1, "cpus": 2}, "threads", "note", "1 of 2 cores"),
        (CPU, {"bf16": False}, "bf16 on the CPU", "ok", "fp32"),
        (CPU, {"memory_gib": 1.5}, "memory", "note", "1.5 GiB"),
        (CPU, {"shm_gib": 0.0625}, "shared memory", "ok", "0.06 GiB"),
        (GPU, {"shm_gib": 0.0625, "gpus": ["a", "b"]}, "shared memory", "note", "--shm-size"),
        (CPU, {"disk_gib": 0.3}, "disk", "note", "0.3 GiB"),
        (CPU, {"writable": False}, "disk", "broken", "cannot be written"),
        (CPU, {"open_files": 256}, "open files", "note", "ulimit -n"),
        (CPU, {"optional": {"timm": None, "pyarrow": "20"}}, "optional", "ok", "pyarrow 20, not installed: timm"),
    ],
)  # fmt: skip
def test_problem_is_reported_with_advice(
    base: SystemInfo, changes: dict[str, Any], name: str, status: str, text: str
) -> None:
    check = by_name(replace(base, **changes))[name]
    assert check.status == status and text in f"{check.result} {check.advice}"


def test_this_machine(monkeypatch: Any, tmp_path: Path) -> None:
    """The real command and its probe, with a DALI that cannot be imported: the report says so and goes on."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['nvidia.dali'] = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "byol_fast", "doctor", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)
    report = json.loads(ended.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    import torch

    assert checks["torch"]["status"] == "ok" and checks["torch"]["result"].startswith(torch.__version__)
    assert checks["kernels"]["result"].startswith("correct loss")
    assert checks["DALI"]["status"] != "ok"
    if version("nvidia-dali-cuda130") is not None:
        assert "import of nvidia.dali halted" in checks["DALI"]["result"]
    assert ended.returncode == int(not report["usable"])
    if not torch.cuda.is_available():
        assert report["usable"]


def test_crash_or_timeout_of_a_probe_is_reported(monkeypatch: Any, tmp_path: Path) -> None:
    """As with a broken driver; results of earlier probes are kept."""
    import byol_fast.doctor.system_info as module

    real = subprocess.run
    begin = "import json, os, time; print(json.dumps(['a', None])); print(json.dumps(['a', 'ok']));"
    begin += "print(json.dumps(['b', None]), flush=True);"
    for end, timeout, ending in (
        ("os.abort()", 60, "the process ended with -6"),
        ("time.sleep(60)", 1, "no answer within 1 s"),
    ):
        code = begin + end
        monkeypatch.setattr(module, "PROBE_SECONDS", timeout)
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(subprocess, "run", lambda _, command=command, **more: real(command, **more))
        results = run_probes()
        assert results["a"] == "ok" and results["b"].startswith(ending)


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", available())
def test_every_source_is_scanned(kind: str, fast: bool, tmp_path: Path) -> None:
    images = pictures() if kind == "array" else with_one_corrupt(pictures())
    source = make(kind, tmp_path / "x", images)
    progress: list[int] = []
    result = scan(source, threads=2, fast=fast, progress=progress.append)
    assert result.images == 40 == progress[-1] and progress == sorted(progress)
    expected = [] if kind == "array" else [source.sample_name(13)]
    assert [image for image, _ in result.corrupt] == expected
    sizes = [source.load(i).size for i in range(40) if source.sample_name(i) not in expected]
    assert list(zip(result.widths.tolist(), result.heights.tolist(), strict=True)) == sizes
    assert result.pixels()["width"]["largest"] == max(w for w, _ in sizes)
    assert result.pixels()["shorter side"]["median"] == int(np.median([min(size) for size in sizes]))
    if source.labels is not None:
        assert list(result.per_class) == list(source.classes) and list(result.per_class.values()) == [10] * 4


def test_fast_scan_finds_invalid_ends_only(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    for number, (name, data, _) in enumerate(CORRUPT.values()):
        (tmp_path / f"{number} {name}").write_bytes(data)
    slow, fast = (scan(open_source(tmp_path), threads=2, fast=fast) for fast in (False, True))
    assert {Path(image).name for image, _ in slow.corrupt} == {
        f"{n} {name}" for n, (name, _, _) in enumerate(CORRUPT.values())
    }
    missed = {Path(image).name for image, _ in slow.corrupt} - {Path(image).name for image, _ in fast.corrupt}
    inside = ("JPEG with a piece missing", "PNG with damaged pixels")
    assert missed == {f"{number} {CORRUPT[kind][0]}" for number, kind in enumerate(CORRUPT) if kind in inside}
    assert dict(fast.corrupt).items() <= dict(slow.corrupt).items()


def test_report_of_images(tmp_path: Path, capsys: Any) -> None:
    for part, count in (("train", 9), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            fill(tmp_path / part / name, count)
    (tmp_path / "train" / "dog" / "x[1].jpg").write_bytes(JPEG[:300])
    data = ScanData(root=tmp_path, threads=1)
    result = scan_data(data, fast=False, console=PlainConsole(width=200))
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'train' / 'dog' / 'x[1].jpg'} is a truncated JPEG (300 bytes)" in shown
    assert "training images: 19 images of 2 classes" in shown and "validation images: 8 images of 2 classes" in shown
    assert "2: from 9 images (cat) to 10 (dog)" in shown
    assert "2: 4 images of each" in shown
    assert "19, 18 decoded in" in shown and "8, 8 decoded in" in shown
    assert "Replace them or remove them, or train with --data.on-corrupt skip." in shown
    assert "shorter side, pixels" in shown and "smallest 40, 5 % 40, median 40" in shown
    assert json.loads(json.dumps(result))["training"]["corrupt"][0]["reason"] == "is a truncated JPEG (300 bytes)"


def test_fast_scan_says_checked_and_not_decoded(tmp_path: Path, capsys: Any) -> None:
    fill(tmp_path, 5)
    (tmp_path / "x.jpg").write_bytes(JPEG[:300])
    result = scan_data(ScanData(root=tmp_path, threads=1), fast=True, console=PlainConsole(width=200))["training"]
    shown = capsys.readouterr().out
    assert "6, header and end of 6 checked in" in shown and "decoded" not in shown
    assert (result["images"], result["checked"], result["decoded"], len(result["corrupt"])) == (6, 6, 0, 1)


def test_validation_classes_that_training_lacks_are_not_reported_as_no_labels(tmp_path: Path, capsys: Any) -> None:
    for name in ("train/cat", "train/dog", "val/cow", "val/hen"):
        (tmp_path / name).mkdir(parents=True)
        fill(tmp_path / name, 2)
    scan_data(ScanData(root=tmp_path, threads=1), fast=True, console=PlainConsole(width=400))
    shown = capsys.readouterr().out
    problem = "2 of 2 validation classes are not among the training classes (such as cow, hen; the training classes are"
    assert f"not used: {problem} cat, dog, ...)" in shown and "no labels" not in shown
    config = Config(data=DataConfig(root=tmp_path))
    reason = knn_problem(config, *open_train_val(config))
    assert reason is not None
    assert reason.startswith(f"the labels of the validation images cannot be used: {problem} cat, dog")
    with pytest.raises(SourceError, match="^knn: 2 of 2 validation classes are not among the training classes"):
        open_train_val(configs.replace(config, {"knn.enabled": "on"}))


def test_exit_codes_and_json(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import byol_fast.doctor.main as module

    fill(tmp_path, 3)
    for info, bad, code in ((CPU, False, 0), (CPU, True, 1), (replace(CPU, torchvision=None), False, 1)):
        monkeypatch.setattr(module, "collect", lambda info=info: info)
        (tmp_path / "x.jpg").write_bytes(b"" if bad else JPEG)
        assert main(Options(data=ScanData(root=tmp_path), json=True)) == code
        report = json.loads(capsys.readouterr().out)
        assert report["usable"] is (info.torchvision is not None)
        assert len(report["images"]["training"]["corrupt"]) == int(bad)
        assert {"name", "status", "result", "advice"} == set(report["checks"][0])
        assert main(Options(data=ScanData(root=tmp_path), fast=True)) == code
        shown = capsys.readouterr().out
        ends = {(0, True): "Ready to train.", (1, True): "some images cannot be read."}
        assert ends.get((code, info.torchvision is not None), "Required, but broken: torchvision") in shown
    with pytest.raises(ValueError, match="--fast requires images; give the folder, too"):
        main(Options(fast=True))


def test_missing_folder_is_an_error(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli(["doctor", "--data.root", "nowhere"])
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert "nowhere does not exist; give a folder" in shown.err
    assert not shown.out  # before the environment is examined, which takes seconds


def test_damaged_shard_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG) for i in range(3)])
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    with pytest.raises(SourceError, match=r"a\.tar is damaged at byte \d+ \(images before it: 3\): the end marker"):
        scan_data(ScanData(root=path, cache=tmp_path / "cache"), fast=True, console=PlainConsole())
