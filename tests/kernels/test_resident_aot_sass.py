"""The kernels of resident data on A100, H100 and B200, with no GPU at hand."""

import re

import pytest

from tests.kernels.conftest import not_interpreted

sass = pytest.importorskip("tests.kernels.sass", exc_type=ImportError)  # needs Triton
cases = pytest.importorskip("tests.kernels.resident_sass", exc_type=ImportError)

pytestmark = not_interpreted


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("crop")])
def test_aot_sass_of_the_crop_does_not_spill(name: str, capability: int) -> None:
    _, code = cases.compile_for(cases.CASES[name], capability)
    assert code.stack == 0 and code.spills == 0
    assert code.registers <= 168  # three programs of 4 warps at a time


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_aot_draws_round_each_operation(capability: int) -> None:
    """Else they were not the host's numbers: a fused multiply-add or an approximate root differs in the last bit."""
    ptx, code = cases.compile_for(cases.CASES["draws"], capability)
    operations = set(re.findall(r"\b(?:fma|mul|add|sub|sqrt|div|rcp|ex2)\.[\w.]*f(?:32|64)\b", ptx))
    assert operations == {"mul.rn.f64", "add.rn.f64", "sub.rn.f64", "sqrt.rn.f64", "div.rn.f64", "mul.rn.f32"}
    assert code.registers <= 128
