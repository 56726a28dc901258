"""Imports of the package and what they do not touch."""

import ast
import subprocess
import sys
from pathlib import Path

import byol_kernels
from tests.kernels.conftest import not_interpreted

PACKAGE = Path(byol_kernels.__file__).parent

pytestmark = not_interpreted


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_torch_and_triton_and_nothing_else() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (n.split(".")[0] for n in names):
                assert name in {"byol_kernels", "torch", "triton"} | sys.stdlib_module_names, f"{path.name}: {name}"


def test_kernels_do_not_import_references() -> None:
    paths = list(PACKAGE.rglob("kernels.py"))
    assert {path.parent.name for path in paths} >= {"loss", "ema", "lars", "running_stats"}
    for path in paths:
        imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("reference" in ast.unparse(node) for node in imports), path


def test_import_does_not_touch_cuda() -> None:
    assert run("import byol_kernels, torch; print(torch.cuda.is_initialized())") == "False"


def test_works_without_triton_and_says_what_is_missing() -> None:
    """As on a machine for which Triton has no wheel: the CPU operators work, a launch explains itself."""
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, byol_kernels as bk\n"
        "p, z = torch.eye(3).requires_grad_(), torch.ones(3, 3)\n"
        "bk.normalized_mse_loss(p, z).backward()\n"
        "bk.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)\n"
        "w = torch.nn.Parameter(torch.eye(3)); w.grad = torch.ones(3, 3); bk.LARS([w], 0.1).step()\n"
        "from byol_kernels.ema.ops import _ema_update_cuda\n"
        "try: _ema_update_cuda([torch.zeros(3)], [torch.ones(3)], None, 0.5, [])\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "must be compiled by Triton" in out and "pip install triton" in out


def test_everything_public_has_a_docstring_and_is_listed() -> None:
    public = {name for name, value in vars(byol_kernels).items() if not name.startswith("_") and callable(value)}
    assert public == set(byol_kernels.__all__)
    for name in byol_kernels.__all__:
        assert getattr(byol_kernels, name).__doc__
