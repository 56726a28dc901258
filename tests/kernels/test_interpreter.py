"""The kernels' own code on CPU tensors: the operators' tests once more, in a process where they run the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is the session that the test below starts")
@pytest.mark.parametrize(
    "names",
    [
        [
            *("test_loss.py", "test_loss_operator.py", "test_loss_local.py", "test_ema.py"),
            *("test_running_stats.py", "test_max_pool.py"),
            *("test_lars.py", "test_lars_layouts.py", "test_lars_found_inf.py", "test_ranges.py"),
        ],
        [
            *("test_photometric.py", "test_photometric_operator.py", "test_blur.py"),
            *("test_crop.py", "test_augment_params.py"),
        ],
    ],
    ids=lambda names: names[0],
)
def test_in_the_interpreter(names: list[str]) -> None:
    # A process of its own: TRITON_INTERPRET decides, when a kernel is defined, what it will be.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"--rootdir={HERE.parent.parent}", f"--confcutdir={HERE}", *(str(HERE / name) for name in names)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
