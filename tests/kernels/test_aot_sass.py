"""Machine code of the kernels for A100, H100 and B200, compiled without a GPU."""

import pytest

from tests.kernels.conftest import not_interpreted

sass = pytest.importorskip("tests.kernels.sass", exc_type=ImportError)  # needs Triton

pytestmark = not_interpreted


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
@pytest.mark.parametrize("name", sass.CASES)
def test_aot_sass_is_wide_and_does_not_spill(name: str, capability: int) -> None:
    case = sass.CASES[name]
    code = sass.compile_for(case, capability)
    assert code.stack == 0 and code.spills == 0
    assert code.registers <= case.registers
    assert code.wide_loads >= case.wide_loads
    assert code.wide_stores >= case.wide_stores


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_aot_loss_arrival_is_ordered(capability: int) -> None:
    """One atomic, a fence around it, and partial sums read past the first-level cache."""
    code = sass.compile_for(sass.CASES["loss_bf16_d256"], capability)
    assert code.count(r"(ATOMG|ATOM)\.E\.ADD\.STRONG\.GPU(\..*)?") == 1
    assert code.count(r"MEMBAR\..*GPU(\..*)?") >= 1
    assert code.count(r"LDG\.E(\.\w+)*\.STRONG\.GPU(\..*)?") >= 1
    assert code.count(r"(RED|REDG)\..*") == 0  # sums by atomics would depend on the order of programs


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_aot_lars_norms_use_one_atomic(capability: int) -> None:
    """That of the arrival counter; `found_inf` is a plain store, absent from a kernel without the flag."""
    code, without_flag = (
        sass.compile_for(sass.CASES[name], capability) for name in ("lars_norms_fp32", "lars_norms_fp32_no_flag")
    )
    for c in (code, without_flag):
        assert c.count(r"(ATOMG|ATOM)\.E\.ADD\.STRONG\.GPU(\..*)?") == 1
        assert c.count(r"(RED|REDG|ATOM|ATOMG)\..*") == 1
    assert code.count(r"STG\..*") == without_flag.count(r"STG\..*") + 1


def test_aot_rounds_to_nearest() -> None:
    """The interpreter truncates float32 to bfloat16, so only the machine code shows how a GPU rounds."""
    code = sass.compile_for(sass.CASES["ema_fp32_copy_bf16"], 90)
    packs = [name for name in code.instructions if name.startswith("F2F")]
    assert packs and not any(".RZ" in name for name in packs)
