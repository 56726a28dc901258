"""The kernels of the augmentation as launches specialize them: `python -m tests.kernels.augment_sass`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import triton

from byol_kernels.augment_params import kernels as augment_params
from byol_kernels.augment_params.params import ATTEMPTS
from byol_kernels.blur import kernels as blur
from byol_kernels.crop import kernels as crop
from byol_kernels.photometric import kernels as photometric
from tests.kernels import sass
from tests.kernels.sass import Constant

SIZE = 224
NONE = Constant(None)
NUMBERS = ("solarize_threshold", "scale_r", "scale_g", "scale_b", "bias_r", "bias_g", "bias_b")
MASK = "*i1!"


class Case(NamedTuple):
    """A kernel as a launch specializes it; types as in `sass.Case`."""

    kernel: Any
    arguments: dict[str, str | Constant]
    options: dict[str, Any]
    registers: int
    """An upper bound for any architecture."""
    loads: Mapping[str, int] = MappingProxyType({})
    """Lower bounds of global loads on the hot path, by width in bits."""
    stores: Mapping[str, int] = MappingProxyType({})


def build(case: Case, capability: int) -> tuple[str, sass.Code]:
    """PTX and machine code for one compute capability."""
    return sass.build(case.kernel, case.arguments, case.options, capability)


def accesses(code: sass.Code, kind: str, width: str) -> int:
    """Global loads (`LDG`) or stores (`STG`) of that many bits."""
    return code.count(rf"{kind}\.E(\.\w+)*\.{width}(\.\w+)*")


def _options(num_warps: int, registers: int) -> dict[str, Any]:
    return {"num_warps": num_warps, "maxnreg": registers, "enable_fp_fusion": True}


def _photometric(
    out: str, *, vector: bool = True, truncate: bool = False, blurred: bool = True, color: bool = True, **widths: Any
) -> Case:
    block, num_warps = photometric.tile_of(SIZE * SIZE)
    arguments: dict[str, str | Constant] = {
        "images_ptr": "*u8!",
        "out_ptr": f"*{out}!",
        "blurred_ptr": "*u8!" if blurred else NONE,
        "blur_ptr": MASK if blurred else NONE,
        **dict.fromkeys(("flip_ptr", "jitter_ptr", "grayscale_ptr"), MASK if color else NONE),
        "factors_ptr": "*fp32!" if color else NONE,
        "order_ptr": "*i32!" if color else NONE,
        "solarize_ptr": MASK,
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
    registers = photometric.MAX_REGISTERS if vector else photometric.MAX_REGISTERS_STRIDED
    return Case(photometric._photometric_kernel, arguments, _options(num_warps, registers), registers, **widths)


def _blur(images: str, out: str, *, chain: bool) -> Case:
    """In the chain it finishes the images; alone it copies those that are not blurred."""
    float32 = images != "u8"
    arguments: dict[str, str | Constant] = {
        "images_ptr": f"*{images}!",
        "out_ptr": f"*{out}!",
        "blur_ptr": MASK,
        "sigma_ptr": "*fp32!",
        "kernel_size_ptr": "*i32!",
        "solarize_ptr": MASK if chain else NONE,
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
    return Case(blur._gaussian_blur_kernel, arguments, _options(num_warps, blur.MAX_REGISTERS), blur.MAX_REGISTERS)


def _crop(size: int, interpolation: str) -> Case:
    arguments: dict[str, str | Constant] = {
        "images_ptr": "*u8!",
        "index_ptr": "*i64!",
        "box_ptr": "*i32!",
        "out_ptr": "*u8!",
        "stride_n": "i32!",
        "stride_c": Constant(1),
        "stride_h": "i32!",
        "stride_w": "i32",
        "SIZE": Constant(size),
        "REACH": Constant(crop.REACH[interpolation]),
        "BLOCK": Constant(crop.BLOCK),
        "BLOCK_K": Constant(crop.BLOCK_K),
    }
    # 168 registers: three programs of 4 warps at a time.
    return Case(crop._resized_crop_kernel, arguments, _options(crop.NUM_WARPS, crop.MAX_REGISTERS), 168)


def _sample_view_params() -> Case:
    arguments: dict[str, str | Constant] = {
        "index_ptr": "*i64!",
        "key_ptr": "*i64!",
        "table_ptr": "*fp64!",
        **dict.fromkeys(("crop_box_ptr", "order_ptr", "kernel_size_ptr"), "*i32!"),
        **dict.fromkeys(("factors_ptr", "sigma_ptr"), "*fp32!"),
        **dict.fromkeys(("flip_ptr", "jitter_ptr", "grayscale_ptr", "blur_ptr", "solarize_ptr"), MASK),
        "batch": "i32!",
        "blur_kernel": "i32",
        "ATTEMPTS": Constant(ATTEMPTS),
        "BLOCK": Constant(augment_params.BLOCK),
    }
    options = {"num_warps": augment_params.BLOCK // 32, "enable_fp_fusion": False}
    return Case(augment_params._sample_view_params_kernel, arguments, options, 128)


# Three 64-bit loads are eight pixels of a thread; there is one set per sweep. Stores: one set each for mirrored or not.
_LOADS, _ONE_SWEEP = {"64": 6}, {"64": 3}
CASES: dict[str, Case] = {
    "photometric_bf16": _photometric("bf16", loads=_LOADS, stores={"128": 6, "64": 6}),
    "photometric_fp32": _photometric("fp32", loads=_LOADS, stores={"128": 12, "64": 6}),
    "photometric_bf16_no_blur": _photometric("bf16", blurred=False, loads=_LOADS, stores={"128": 6}),
    "photometric_bf16_truncate": _photometric("bf16", truncate=True, loads=_LOADS, stores={"128": 6, "64": 6}),
    "photometric_u8": _photometric("u8", blurred=False, loads=_LOADS, stores={"64": 6}),
    "photometric_bf16_finish": _photometric("bf16", blurred=False, color=False, loads=_ONE_SWEEP, stores={"128": 3}),
    "photometric_bf16_strided_truncate": _photometric("bf16", vector=False, truncate=True),
    "blur_u8_to_bf16": _blur("u8", "bf16", chain=True),
    "blur_u8": _blur("u8", "u8", chain=False),
    "blur_fp32": _blur("fp32", "fp32", chain=False),
    "crop_32": _crop(32, "bicubic"),
    "crop_28_bilinear": _crop(28, "bilinear"),
    "crop_224": _crop(224, "bicubic"),
    "sample_view_params": _sample_view_params(),
}


def main() -> None:
    """Print registers, widths and spills of every kernel on every architecture."""
    print(f"triton {triton.__version__}")
    print(
        "| kernel | sm | registers | stack | spills | 64-bit loads | 64-, 128-bit stores | tensor core | instructions |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for capability in sass.CAPABILITIES:
            _, code = build(case, capability)
            stores = ", ".join(str(accesses(code, "STG", width)) for width in ("64", "128"))
            print(
                f"| {name} | {capability} | {code.registers} | {code.stack} | {code.spills} | "
                f"{accesses(code, 'LDG', '64')} | {stores} | {code.count(r'HMMA.*')} | {code.instructions.total()} |"
            )


if __name__ == "__main__":
    main()
