"""Machine code of the augmentation's kernels on A100, H100 and B200, compiled without a GPU."""

import re

import pytest

from tests.kernels.conftest import not_interpreted

sass = pytest.importorskip("tests.kernels.sass", exc_type=ImportError)  # needs Triton
cases = pytest.importorskip("tests.kernels.augment_sass", exc_type=ImportError)

pytestmark = not_interpreted

ON_ALL = {"photometric_bf16", "photometric_u8", "blur_u8_to_bf16", "crop_32"}
"""Cases compiled for every architecture; the others run the same code, and `slow` compiles them for the other two."""


def compilations() -> list[object]:
    return [
        pytest.param(name, capability, marks=[] if name in ON_ALL or capability == 90 else pytest.mark.slow)
        for name in cases.CASES
        if name != "sample_view_params"
        for capability in sass.CAPABILITIES
    ]


@pytest.mark.parametrize(("name", "capability"), compilations())
def test_aot_sass_is_wide_and_does_not_spill(name: str, capability: int) -> None:
    case = cases.CASES[name]
    _, code = cases.build(case, capability)
    assert code.stack == 0 and code.spills == 0
    assert code.registers <= case.registers
    for kind, widths in (("LDG", case.loads), ("STG", case.stores)):
        for width, number in widths.items():
            assert cases.accesses(code, kind, width) >= number
    if name.startswith("blur_u8"):
        assert code.count(r"HMMA\..*F32.*") >= 9  # on the tensor cores, summed in float32
    if name.startswith("photometric"):
        assert code.count(r"MUFU\..*") == 0  # no division, no square root
        if "truncate" not in name and "finish" not in name:
            assert code.count(r"FFMA2?\..*SAT.*") >= 48  # clipping is free: 3 channels, 8 pixels, two sweeps


@pytest.mark.parametrize("name", ["blur_u8_to_bf16", "crop_32"])
def test_aot_threads_of_a_warp_take_pixels_side_by_side(name: str) -> None:
    """In Triton's own intermediate form. Triton 3.6 would let them take one column of a matrix of addresses."""
    case = cases.CASES[name]
    text = sass.compiled(case.kernel, case.arguments, case.options, 90).asm["ttgir"]
    orders = dict(re.findall(r"^(#\w+) = #ttg\.blocked<.*order = \[([\d, ]+)\]", text, flags=re.MULTILINE))
    accesses = re.findall(r"tt\.(?:load|store) .*: tensor<((?:\d+x)+)!tt\.ptr<i?\w+>, (#\w+)>", text)
    assert len(accesses) >= 6  # three channels
    for shape, layout in accesses:
        assert int(orders[layout].split(",")[0]) == shape.count("x") - 1


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_aot_sample_view_params_rounds_each_operation(capability: int) -> None:
    """A fused multiply-add or an approximate root would differ from the host in the last bit."""
    case = cases.CASES["sample_view_params"]
    ptx, code = cases.build(case, capability)
    operations = set(re.findall(r"\b(?:fma|mul|add|sub|sqrt|div|rcp|ex2)\.[\w.]*f(?:32|64)\b", ptx))
    assert operations == {"mul.rn.f64", "add.rn.f64", "sub.rn.f64", "sqrt.rn.f64", "div.rn.f64", "mul.rn.f32"}
    assert code.registers <= case.registers
