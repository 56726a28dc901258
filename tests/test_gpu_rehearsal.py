"""`make gpu-test` and `make gpu-bench` without a GPU: some parts are rehearsed, so that none of it rots; slow: all."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_bench
from byol_fast.profiling import inductor
from tests import gpu_report
from tests.gpu import CAPABILITIES
from tests.gpu_report import Outcome, details, line

ROOT = Path(__file__).parents[1]

# What the GPU host has, of what is imported there (its Python is 3.12), and what pack_wheels.sh packs for DALI.
ON_THE_HOST = {
    "accelerate", "einops", "hypothesis", "iniconfig", "numpy", "nvidia-ml-py", "onnx", "onnxruntime", "onnxscript",
    "packaging", "pillow", "pluggy", "pyarrow", "pygments", "pytest", "pytest-benchmark", "pytorch-lightning", "rich",
    "safetensors", "scikit-learn", "sortedcontainers", "tensorboard", "timm", "torch", "torchvision", "tqdm", "triton",
    "typing-extensions",
}  # fmt: skip
FOR_DALI = {
    "astunparse", "gast", "libcst", "makefun", "nvidia-dali-cuda130", "nvidia-libnvcomp-cu13",
    "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13", "nvtx", "optree", "six",
}  # fmt: skip
NEVER_IMPORTED = {"hydra-core"}  # lightly's command line; its antlr has no wheel


@pytest.fixture(autouse=True)
def _environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands tell their processes by variables what they are; those of this process are put back."""
    for name in ("BYOL_FAST_REHEARSE", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_a_part_of_the_tests_is_rehearsed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rehearse", "--only", "knn", "--logs", str(tmp_path), "-k", "neighbours_are"]
    assert gpu_report.main(arguments) == 0, (tmp_path / "knn.log").read_text()[-3000:]
    assert re.search(r"^knn +ok .*: 3 passed$", capfd.readouterr().out, flags=re.MULTILINE)


def test_a_part_of_the_benchmark_is_rehearsed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main(["--rehearse", "--only", "ceilings", "--save", str(tmp_path)]) == 0, capfd.readouterr()
    text = (tmp_path / "summary.md").read_text()
    assert "no figure means anything" in text and "kernels has no results" in text
    content = json.loads((tmp_path / "ceilings.json").read_text())
    assert {one["dtype"] for one in content["ceilings"]} == {"bf16", "tf32", "fp32"}
    assert content["environment"]["device"] == "cpu" and (tmp_path / "environment.json").exists()


def test_a_rehearsal_never_lands_among_the_results(capfd: pytest.CaptureFixture[str]) -> None:
    into = ROOT / "benchmarks" / "results" / "a_gpu"
    with pytest.raises(SystemExit):
        gpu_bench.main(["--rehearse", "--only", "data", "--save", str(into)])
    assert "must stay out of benchmarks/results" in capfd.readouterr().err
    assert not into.exists()


@pytest.mark.slow
def test_without_a_gpu_everything_is_skipped_and_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_report.main(["--only", "ddp", "--logs", str(tmp_path)]) == 0
    assert re.search(r"^ddp +skipped .*needs a CUDA device", capfd.readouterr().out, flags=re.MULTILINE)


@pytest.mark.slow
def test_all_of_the_tests_are_rehearsed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = gpu_report.main(["--rehearse", "--logs", str(tmp_path)])
    told = capfd.readouterr().out
    assert code == 0, told
    assert {text.split()[0] for text in told.splitlines() if " ok " in text} == set(CAPABILITIES)


@pytest.mark.slow
def test_all_of_the_benchmark_is_rehearsed(tmp_path: Path) -> None:
    assert gpu_bench.main(["--rehearse", "--save", str(tmp_path)]) == 0


# ------------------------------------------------------------------------------------------------ what it says


def test_a_failure_says_what_to_look_at(tmp_path: Path) -> None:
    outcome = Outcome(passed=3, failures={"tests/x.py::test_y": "assert 1 == 2\nmore"}, seconds=4.0)
    outcome.skips["no onnx"] = 2
    assert line("export", outcome).startswith("export    FAILED")
    assert "3 passed, 1 failed, 2 skipped (no onnx (2))" in line("export", outcome)
    text = "\n".join(details("export", outcome, tmp_path / "export.log"))
    assert "byol_fast/export.py" in text and "'tests/x.py::test_y'" in text and "assert 1 == 2" in text
    assert details("export", Outcome(passed=1), tmp_path) == []


def test_wheels_for_the_host_bring_all_they_need() -> None:
    listed = dict(text.split("==") for text in (ROOT / "benchmarks" / "gpu-host.txt").read_text().split())
    there = ON_THE_HOST | FOR_DALI | NEVER_IMPORTED | {plain(name) for name in listed}
    for needs in (requirements("byol_fast"), *(requirements(name) for name in listed)):
        assert {plain(name) for name in needs} <= there
    tested = dict(text.split("==") for text in (ROOT / "constraints.txt").read_text().splitlines() if "==" in text)
    assert {name: tested[name] for name in listed if name in tested} == {n: v for n, v in listed.items() if n in tested}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[str]:
    """Distributions that one needs on Linux with Python 3.12, extras aside; nothing of one that is not installed."""
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    kept = [text for text in texts if "extra ==" not in text and "python_version <" not in text]
    return [re.split(r"[\s<>=!~;\[(]", text)[0] for text in kept]


# A forward and a backward graph as inductor writes them for a GPU, shortened.
FORWARD = """
triton_tem_fused__native_batch_norm_legit_convolution_relu_3 = async_compile.triton('triton_tem_fused_conv', '''
def triton_tem_fused_conv(arg_X, arg_W, in_ptr2, out_ptr0):
    matrix_x = tl.load(x_ptrs, mask=mask_x, other=0.0)
    matrix_w = tl.load(w_ptrs, mask=mask_w, other=0.0)
    acc += tl.dot(matrix_x, matrix_w, allow_tf32=ALLOW_TF32)
    tmp0 = tl.load(in_ptr2 + xindex)
    tmp1 = acc + tmp0
''', device_str='cuda')
triton_tem_fused_mm_relu_4 = async_compile.triton('triton_tem_fused_mm_relu_4', '''
def triton_tem_fused_mm_relu_4(arg_A, arg_B, out_ptr0):
    tmp0 = tl.load(arg_A + idx)
    tmp1 = tl.full([1], 0, tl.int32)
    tmp2 = triton_helpers.maximum(tmp1, tmp0)
    a = tmp2
    b = tl.load(arg_B + idx)
    acc = tl.dot(a, b, acc, allow_tf32=ALLOW_TF32)
''', device_str='cuda')
triton_poi_fused_relu_5 = async_compile.triton('triton_poi_fused_relu_5', '''
def triton_poi_fused_relu_5(in_ptr0, out_ptr0):
    tmp0 = tl.load(in_ptr0)
''', device_str='cuda')

def call(args):
    primals_1, primals_2 = args
    args.clear()
    assert_size_stride(primals_1, (64, 3, 7, 7), (147, 1, 21, 3))
        buf0 = extern_kernels.convolution(primals_2, primals_1, stride=(2, 2))
        triton_tem_fused__native_batch_norm_legit_convolution_relu_3.run(buf0, buf1, grid=1)
        triton_tem_fused_mm_relu_4.run(buf1, buf2, grid=1)
        triton_tem_fused_mm_relu_4.run(buf2, buf3, grid=1)
        triton_poi_fused_relu_5.run(buf3, buf4, 8, grid=1)
        extern_kernels.mm(buf4, buf5, out=buf6)
"""
BACKWARD = """
def call(args):
    primals_1, convolution, relu, relu_1, le, tangents_1 = args
    args.clear()
    assert_size_stride(convolution, (2, 64, 4, 4), (1024, 1, 256, 64))
    assert_size_stride(relu, (2, 64, 4, 4), (1024, 1, 256, 64))
    assert_size_stride(relu_1, (2, 8), (8, 1))
    assert_size_stride(le, (2, 8), (8, 1))
    assert_size_stride(tangents_1, (), ())
        buf0 = torch.ops.aten.convolution_backward.default(tangents_1, relu, primals_1)
"""


def test_inductors_code_is_read() -> None:
    found = inductor.analyse([FORWARD, BACKWARD])
    forward, backward = found["graphs"]
    assert (forward["is_backward"], backward["is_backward"]) == (False, True)
    assert forward["extern"] == {"extern_kernels.convolution": 1, "extern_kernels.mm": 1}
    assert len(forward["templates"]) == 2 and forward["templates_with_prologue"] == ["triton_tem_fused_mm_relu_4"]
    assert forward["kernels"]["triton_tem_fused_mm_relu_4"] == 2
    assert backward["extern"] == {"torch.ops.aten.convolution_backward": 1}
    assert backward["saved"]["relu"] == {"tensors": 2, "elements": 2064}
    assert backward["saved"]["convolution"] == {"tensors": 1, "elements": 2048}
    library, generated, prologues, saved = found["answers"]
    assert "1 convolutions forward, 1 backward, 1 matrix products" in library
    assert "2 kernels, 3 calls" in generated and "1 of 2" in prologues and "0.0 M elements that ReLUs gave" in saved


def test_what_ncu_prints_is_read() -> None:
    header = '"ID","Process ID","Kernel Name",' + ",".join(f'"{metric}"' for metric in inductor.NCU_METRICS)
    rows: list[Any] = [header, '"","","","byte","byte","ns"', '"0","7","triton_poi_fused_relu_5","1,000","500","10"']
    rows += ['"1","7","_lars_apply_kernel","4000","4000","2"', '"2","7","triton_poi_fused_relu_5","1000","500","10"']
    first, second = inductor.read_ncu("\n".join(["==PROF== Connected to process 7", "  compiled in 3 s", *rows]))
    assert first["kernel"] == "_lars_apply_kernel" and first["gb_per_s"] == pytest.approx(4000)
    assert (second["launches"], second["read_bytes"], second["written_bytes"]) == (2, 2000, 1000)
    assert second["seconds"] == pytest.approx(20e-9)
    families = {row["family"]: row for row in inductor.by_family([first, second])}
    assert families["pointwise"]["gb"] == pytest.approx(3e-6)
    assert inductor.read_ncu("==ERROR== LibraryNotLoaded") == []
