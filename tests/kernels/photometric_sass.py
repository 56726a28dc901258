"""The photometric and the blur kernel as launches specialise them: `python -m tests.kernels.photometric_sass`."""

from typing import Any, NamedTuple

import triton

from byol_kernels import blur
from byol_kernels.photometric import MAX_REGISTERS, MAX_REGISTERS_STRIDED, _photometric_kernel, tile_of
from tests.kernels import sass
from tests.kernels.sass import Constant

SIZE = 224
NONE = Constant(None)
NUMBERS = ("solarize_threshold", "scale_r", "scale_g", "scale_b", "bias_r", "bias_g", "bias_b")


class Case(NamedTuple):
    """As `sass.Case`, with the limit that the launcher sets."""

    kernel: Any
    arguments: dict[str, str | Constant]
    num_warps: int
    registers: int
    loads: dict[str, int]
    """At least so many on the hot path, by width in bits."""
    stores: dict[str, int]


def compile_for(case: Case, capability: int) -> sass.Code:
    """The code for one compute capability."""
    options = {"num_warps": case.num_warps, "maxnreg": case.registers, "enable_fp_fusion": True}
    return sass.build(case.kernel, case.arguments, options, capability)[1]


def accesses(code: sass.Code, kind: str, width: str) -> int:
    """Global loads (`LDG`) or stores (`STG`) of that many bits."""
    return code.count(rf"{kind}\.E(\.\w+)*\.{width}(\.\w+)*")


def _photometric(
    out: str, *, vector: bool = True, truncate: bool = False, blurred: bool = True, colour: bool = True, **widths: Any
) -> Case:
    block, num_warps = tile_of(SIZE * SIZE)
    coin = "*i1!"
    arguments: dict[str, str | Constant] = {
        "images_ptr": "*u8!",
        "out_ptr": f"*{out}!",
        "blurred_ptr": "*u8!" if blurred else NONE,
        "blur_ptr": coin if blurred else NONE,
        **dict.fromkeys(("flip_ptr", "jitter_ptr", "grayscale_ptr"), coin if colour else NONE),
        "factors_ptr": "*fp32!" if colour else NONE,
        "order_ptr": "*i32!" if colour else NONE,
        "solarize_ptr": coin,
        "stride_b": "i32!",
        "stride_h": "i32!",
        "stride_c": Constant(1),
        "stride_w": "i32",
        **dict.fromkeys(NUMBERS, "fp32"),
        "AREA": Constant(SIZE * SIZE),
        "WIDTH": Constant(SIZE),
        "VECTOR": Constant(vector),
        "TRUNCATE": Constant(truncate),
        "PTX": Constant(True),
        "BLOCK": Constant(block),
    }
    registers = MAX_REGISTERS if vector else MAX_REGISTERS_STRIDED
    return Case(_photometric_kernel, arguments, num_warps, registers, widths.get("loads", {}), widths.get("stores", {}))


def _blur(images: str, out: str, *, chain: bool) -> Case:
    """In the chain it finishes the images; alone it copies those that are not blurred."""
    float32 = images != "u8"
    arguments: dict[str, str | Constant] = {
        "images_ptr": f"*{images}!",
        "out_ptr": f"*{out}!",
        "blur_ptr": "*i1!",
        "sigma_ptr": "*fp32!",
        "window_ptr": "*i32!",
        "solarize_ptr": "*i1!" if chain else NONE,
        "stride_b": "i32!",
        "stride_h": "i32!",
        "stride_c": Constant(1),
        "stride_w": "i32",
        "height": "i32!",
        "width": "i32!",
        **dict.fromkeys(NUMBERS, "fp32"),
        "COPY": Constant(not chain),
        "ROUND": Constant(False),
        "FLOAT32": Constant(float32),
        "BLOCK": Constant(blur.BLOCK),
        "BLOCK_K": Constant(blur.BLOCK_K),
    }
    num_warps = blur.NUM_WARPS_FLOAT32 if float32 else blur.NUM_WARPS
    return Case(blur._gaussian_blur_kernel, arguments, num_warps, blur.MAX_REGISTERS, {}, {})


# Three 64-bit loads are eight pixels of a thread; there is one set a sweep. Stores: one set each for mirrored or not.
_LOADS, _ONE_SWEEP = {"64": 6}, {"64": 3}
CASES: dict[str, Case] = {
    "photometric_bf16": _photometric("bf16", loads=_LOADS, stores={"128": 6, "64": 6}),
    "photometric_fp32": _photometric("fp32", loads=_LOADS, stores={"128": 12, "64": 6}),
    "photometric_bf16_no_blur": _photometric("bf16", blurred=False, loads=_LOADS, stores={"128": 6}),
    "photometric_bf16_truncate": _photometric("bf16", truncate=True, loads=_LOADS, stores={"128": 6, "64": 6}),
    "photometric_u8": _photometric("u8", blurred=False, loads=_LOADS, stores={"64": 6}),
    "photometric_bf16_finish": _photometric("bf16", blurred=False, colour=False, loads=_ONE_SWEEP, stores={"128": 3}),
    "photometric_bf16_strided_truncate": _photometric("bf16", vector=False, truncate=True),
    "blur_u8_to_bf16": _blur("u8", "bf16", chain=True),
    "blur_u8": _blur("u8", "u8", chain=False),
    "blur_fp32": _blur("fp32", "fp32", chain=False),
}


def main() -> None:
    """Prints registers, widths and spills of every kernel on every architecture."""
    print(f"triton {triton.__version__}")
    print(
        "| kernel | sm | registers | stack | spills | 64-bit loads | 64-, 128-bit stores | tensor core | instructions |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for capability in sass.CAPABILITIES:
            code = compile_for(case, capability)
            stores = ", ".join(str(accesses(code, "STG", width)) for width in ("64", "128"))
            print(
                f"| {name} | {capability} | {code.registers} | {code.stack} | {code.spills} | "
                f"{accesses(code, 'LDG', '64')} | {stores} | {code.count(r'HMMA.*')} | {code.instructions.total()} |"
            )


if __name__ == "__main__":
    main()
