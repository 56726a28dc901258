"""The package as a whole: third-party imports, import side effects, and the built wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_third_party_imports() -> None:
    standard = set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imports_of(path) - standard <= {"torch", "triton", "byol_kernels"}, path
    for path in (ROOT / "byol_fast").rglob("*.py"):
        assert not imports_of(path) & {"tests", "benchmarks", "kernels"}, path


def test_help_does_not_import_torch_and_imports_touch_neither_cuda_nor_dali() -> None:
    code = (
        "import sys, byol_fast.cli.main as c\n"
        "try: c.main(['train', 'demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "import torch, byol_kernels, byol_fast, byol_fast.training.trainer, byol_fast.data\n"
        "assert not torch.cuda.is_initialized(); assert not any(m.startswith('nvidia.dali') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a checkout")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    typed = {"byol_fast/py.typed", "byol_kernels/py.typed"}
    assert typed | {"byol_fast/data/demo/fashion_mnist.npz"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/")) for name in names)
    assert wheel.stat().st_size < 7_000_000
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    assert (site / "bin" / "byol-fast").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import byol_fast, byol_kernels, torch\n"
        f"assert byol_fast.__file__.startswith({str(site)!r}) and byol_kernels.__file__.startswith({str(site)!r})\n"
        "p = torch.randn(4, 8); print(float(byol_kernels.byol_loss(p, p, p, p)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert abs(float(ended.stdout)) < 1e-5
