"""The packages of benchmarks/gpu/host.txt suffice for a GPU host without a network."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Installed on the GPU host (Python 3.12), as far as imported there, and brought with DALI.
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
NEVER_IMPORTED = {"hydra-core"}  # for the command line of lightly; its antlr has no wheel


def test_host_packages_have_all_requirements() -> None:
    listed = dict(text.split("==") for text in (ROOT / "benchmarks" / "gpu" / "host.txt").read_text().split())
    there = ON_THE_HOST | FOR_DALI | NEVER_IMPORTED | {normalize_name(name) for name in listed}
    for needs in (requirements("byol_fast"), *(requirements(name) for name in listed)):
        assert {normalize_name(name) for name in needs} <= there
    tested = dict(text.split("==") for text in (ROOT / "constraints.txt").read_text().splitlines() if "==" in text)
    assert {name: tested[name] for name in listed if name in tested} == {n: v for n, v in listed.items() if n in tested}


def normalize_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[str]:
    """Distributions required on Linux with Python 3.12, without extras; empty if the distribution is not installed."""
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    required = [text for text in texts if "extra ==" not in text and "python_version <" not in text]
    return [re.split(r"[\s<>=!~;\[(]", text)[0] for text in required]
