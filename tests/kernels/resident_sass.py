"""The kernels of resident data as launches specialise them: `python -m tests.kernels.resident_sass`."""

from typing import Any, NamedTuple

import triton

from byol_kernels import crop, draws
from tests.kernels import sass
from tests.kernels.sass import Constant


class Case(NamedTuple):
    """A kernel as a launch specialises it; types as in `sass.Case`."""

    kernel: Any
    arguments: dict[str, str | Constant]
    options: dict[str, Any]


def compile_for(case: Case, capability: int) -> tuple[str, sass.Code]:
    """PTX and machine code for one compute capability."""
    return sass.build(case.kernel, case.arguments, case.options, capability)


def _crop(size: int, reach: int) -> Case:
    arguments: dict[str, str | Constant] = {
        "images_ptr": "*u8!",
        "index_ptr": "*i64!",
        "window_ptr": "*i32!",
        "out_ptr": "*u8!",
        "stride_n": "i32!",
        "stride_c": Constant(1),
        "stride_h": "i32!",
        "stride_w": "i32",
        "SIZE": Constant(size),
        "REACH": Constant(reach),
        "BLOCK": Constant(crop.BLOCK),
        "BLOCK_K": Constant(crop.BLOCK_K),
    }
    options = {"num_warps": crop.NUM_WARPS, "maxnreg": crop.MAX_REGISTERS, "enable_fp_fusion": True}
    return Case(crop._resized_crop_kernel, arguments, options)


def _draws() -> Case:
    arguments: dict[str, str | Constant] = {
        "index_ptr": "*i64!",
        "key_ptr": "*i64!",
        "table_ptr": "*fp64!",
        **dict.fromkeys(("window_ptr", "order_ptr", "blur_window_ptr"), "*i32!"),
        **dict.fromkeys(("factors_ptr", "sigma_ptr"), "*fp32!"),
        **dict.fromkeys(("flip_ptr", "jitter_ptr", "grayscale_ptr", "blur_ptr", "solarize_ptr"), "*i1!"),
        "batch": "i32!",
        "blur_kernel": "i32",
        "ATTEMPTS": Constant(draws.ATTEMPTS),
        "BLOCK": Constant(draws.BLOCK),
    }
    return Case(draws._draw_view_kernel, arguments, {"num_warps": draws.BLOCK // 32, "enable_fp_fusion": False})


CASES = {"crop_32": _crop(32, 2), "crop_28_bilinear": _crop(28, 1), "crop_224": _crop(224, 2), "draws": _draws()}


def main() -> None:
    """Prints registers, stack and spills of every kernel on every architecture."""
    print(f"triton {triton.__version__}")
    print("| kernel | sm | registers | stack | spills | instructions |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for capability in sass.CAPABILITIES:
            _, code = compile_for(case, capability)
            print(
                f"| {name} | {capability} | {code.registers} | {code.stack} | {code.spills} | "
                f"{code.instructions.total()} |"
            )


if __name__ == "__main__":
    main()
