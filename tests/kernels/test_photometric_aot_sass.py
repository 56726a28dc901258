"""What the photometric and the blur kernel look like on A100, H100 and B200, with no GPU at hand."""

import pytest

from tests.kernels.conftest import not_interpreted

sass = pytest.importorskip("tests.kernels.sass", exc_type=ImportError)  # needs Triton
cases = pytest.importorskip("tests.kernels.photometric_sass", exc_type=ImportError)

pytestmark = not_interpreted


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
@pytest.mark.parametrize("name", cases.CASES)
def test_aot_sass_is_wide_and_does_not_spill(name: str, capability: int) -> None:
    case = cases.CASES[name]
    code = cases.compile_for(case, capability)
    assert code.stack == 0 and code.spills == 0
    assert code.registers <= case.registers
    for kind, widths in (("LDG", case.loads), ("STG", case.stores)):
        for width, number in widths.items():
            assert cases.accesses(code, kind, width) >= number
    if name.startswith("blur_u8"):
        assert code.count(r"HMMA\..*F32.*") >= 9  # on the tensor cores, summed in float32
    if "truncate" not in name and "finish" not in name and name.startswith("photometric"):
        assert code.count(r"FFMA2?\..*SAT.*") >= 48  # clipping costs nothing: 3 channels, 8 pixels, two sweeps
    assert code.count(r"MUFU\..*") == 0 or name.startswith("blur")  # no division, no square root
