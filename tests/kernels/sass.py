"""Ahead-of-time compilation of kernels and statistics of their machine code: `python -m tests.kernels.sass`."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from byol_kernels import _multi_tensor
from byol_kernels.ema import kernels as ema
from byol_kernels.lars import kernels as lars
from byol_kernels.loss import kernels as loss
from byol_kernels.max_pool import kernels as max_pool
from byol_kernels.running_stats import kernels as running_stats

CAPABILITIES = (80, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F32, BF16 = tl.float32, tl.bfloat16


class Constant(NamedTuple):
    """The value of an argument that is known when the kernel is compiled."""

    value: Any


class Case(NamedTuple):
    """A kernel as a launch specializes it.

    A type that ends in `!` is a pointer to 16-byte aligned memory, or an integer divisible by 16, which the launcher
    would have found out about its arguments.
    """

    kernel: Any
    arguments: Mapping[str, "str | Constant"]
    num_warps: int
    registers: int
    """An upper bound for any architecture."""
    wide_loads: int
    """At least this many 128-bit loads on the hot path."""
    wide_stores: int


class Code(NamedTuple):
    """Registers, stack and instructions of one kernel."""

    registers: int
    stack: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Instructions whose full name matches."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def wide_loads(self) -> int:
        """Global loads of 16 bytes or more."""
        return self.count(r"LDG\.E(\.\w+)*\.(128|256)(\.\w+)*")

    @property
    def wide_stores(self) -> int:
        """Global stores of 16 bytes or more."""
        return self.count(r"STG\.E(\.\w+)*\.(128|256)(\.\w+)*")

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count(r"(LDL|STL)(\..*)?")


def compiled(
    kernel: Any, arguments: Mapping[str, "str | Constant"], options: Mapping[str, Any], capability: int
) -> Any:
    """Triton's result for one compute capability: 80 for A100, 90 for H100 and H200, 100 for B200."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        argument = arguments[name]
        if isinstance(argument, Constant):
            signature[name] = "constexpr"
            constants[(index,)] = argument.value
        else:
            signature[name] = argument.removesuffix("!")
            if argument.endswith("!"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(options),
    )


def build(
    kernel: Any, arguments: Mapping[str, "str | Constant"], options: Mapping[str, Any], capability: int
) -> tuple[str, Code]:
    """PTX and machine code for one compute capability."""
    result = compiled(kernel, arguments, options, capability)
    return result.asm["ptx"], read(result.asm["cubin"])


def read(binary: bytes) -> Code:
    """Disassemble a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", listing, flags=re.MULTILINE)
    return Code(int(found[1]), int(found[2]), Counter(names))


def compile_for(case: Case, capability: int) -> Code:
    """The code of a kernel for one compute capability."""
    options = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    return build(case.kernel, case.arguments, options, capability)[1]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _loss(
    dtype: str, dim: int, *, stats: bool = False, local: bool = False, registers: int, wide_loads: int, wide_stores: int
) -> Case:
    block_b, block_d, num_warps = loss.tile_of(dim)
    matrix, optional = f"*{dtype}!", "*fp32!" if stats else Constant(None)
    arguments: dict[str, str | Constant] = {
        **dict.fromkeys(("local_ptr", "grad_local_ptr"), matrix if local else Constant(None)),
        **dict.fromkeys(("local_view_stride", "local_stride"), "i32!"),
        **dict.fromkeys(("pa_ptr", "za_ptr", "pb_ptr", "zb_ptr", "grad_a_ptr", "grad_b_ptr"), matrix),
        **dict.fromkeys(("pa_stride", "za_stride", "pb_stride", "zb_stride", "batch", "dim"), "i32!"),
        **dict.fromkeys(("row_loss_ptr", "cosine_ptr", "std_ptr", "moments_ptr"), optional),
        **dict.fromkeys(("loss_ptr", "partial_ptr"), "*fp32!"),
        "arrival_counter_ptr": "*i32",
        "rows_per_program": "i32",
        "eps": "fp32",
        "grad_factor": "fp32",
        "BLOCK_B": Constant(block_b),
        "BLOCK_D": Constant(block_d),
        "BLOCK_G": Constant(64),
        "BLOCK_PARTIALS": Constant(128),
        "BLOCK_STD": Constant(loss.BLOCK_STD),
    }
    kernel = loss._normalized_mse_fwd_kernel
    return Case(kernel, arguments, num_warps, registers, wide_loads, wide_stores)


def _bwd(dtype: str, *, local: bool = False) -> Case:
    arguments: dict[str, str | Constant] = {
        "grad_loss_ptr": "*fp32!",
        **dict.fromkeys(("grad_a_ptr", "grad_b_ptr", "out_a_ptr", "out_b_ptr"), f"*{dtype}!"),
        **dict.fromkeys(("grad_local_ptr", "out_local_ptr"), f"*{dtype}!" if local else Constant(None)),
        "numel": "i32!",
        "factor": "fp32",
        "BLOCK": Constant(loss.BLOCK_BWD),
    }
    return Case(loss._normalized_mse_bwd_kernel, arguments, 4, 40, 2, 2)


def _max_pool(*, backward: bool) -> Case:
    block_w, block_c = max_pool.tile_of(64)
    matrices = ("dy_ptr", "dx_ptr") if backward else ("x_ptr", "y_ptr")
    arguments: dict[str, str | Constant] = {
        **dict.fromkeys(matrices, "*bf16!"),
        "place_ptr": "*i8!",
        **dict.fromkeys(("height", "width", "channels"), "i32!"),
        **dict.fromkeys(("out_height", "out_width"), "i32"),
        "BLOCK_W": Constant(block_w),
        "BLOCK_C": Constant(block_c),
        "COMPUTE": Constant(F32),
    }
    kernel = max_pool._max_pool_bwd_kernel if backward else max_pool._max_pool_fwd_kernel
    return Case(kernel, arguments, max_pool.NUM_WARPS, 128, *((4, 4) if backward else (9, 1)))


_TABLES: dict[str, str | Constant] = {
    **dict.fromkeys(("addresses_ptr", "rows_ptr", "chunks_ptr", "lr_addresses_ptr"), "*i64!"),
    **dict.fromkeys(("groups_ptr", "ratios_ptr", "tau_ptr", "grad_scale_ptr", "found_inf_ptr"), "*fp32!"),
    "partials_ptr": "*fp64!",
    "arrival_counters_ptr": "*i32!",
    "num_rows": "i32",
    "num_groups": "i32",
    "num_adapted_chunks": "i32",
    "weight": "fp32",
    "one_minus_tau": "fp32",
    "CHUNK": Constant(_multi_tensor.CHUNK),
    "BLOCK_PARTIALS": Constant(lars.BLOCK_PARTIALS),
    "BLOCK_GROUPS": Constant(2),
}


def _multi(kernel: Any, registers: int, wide_loads: int, wide_stores: int, **constants: Any) -> Case:
    arguments: dict[str, str | Constant] = {**_TABLES}
    arguments.update((name, Constant(value)) for name, value in constants.items())
    return Case(kernel, arguments, _multi_tensor.NUM_WARPS, registers, wide_loads, wide_stores)


def _statistics(*dtype_combos: tuple[Any, ...]) -> Case:
    arguments: dict[str, str | Constant] = {
        **dict.fromkeys(("addresses_ptr", "rows_ptr"), "*i64!"),
        "momentum_ptr": "*fp64!",
        "num_rows": "i32",
        "found_inf_ptr": "*fp32!",
        "DTYPE_COMBOS": Constant(dtype_combos),
        "BLOCK_C": Constant(running_stats.BLOCK_C),
    }
    # A layer has a few thousand numbers: what counts is that nothing is spilled, not how wide it is read.
    return Case(running_stats._update_running_stats_kernel, arguments, running_stats.NUM_WARPS, 80, 0, 0)


def _has(*, target: bool = False, copies: bool = False) -> dict[str, bool]:
    return {"HAS_TARGET": target, "HAS_P_COPY": copies, "HAS_T_COPY": copies}


_ALL_F32 = (F32,) * 6
_EMA, _NORMS, _APPLY = ema._ema_update_kernel, lars._lars_norms_kernel, lars._lars_apply_kernel

# 16 elements a thread: 4 loads of a float32 tensor, 2 of a bfloat16 one.
CASES: dict[str, Case] = {
    "loss_bf16_d256": _loss("bf16", 256, registers=64, wide_loads=2, wide_stores=1),
    "loss_fp16_d256": _loss("fp16", 256, registers=64, wide_loads=2, wide_stores=1),
    "loss_fp32_d256": _loss("fp32", 256, registers=72, wide_loads=4, wide_stores=2),
    "loss_bf16_d256_stats": _loss("bf16", 256, stats=True, registers=128, wide_loads=2, wide_stores=1),
    "loss_bf16_d8192_stats": _loss("bf16", 8192, stats=True, registers=128, wide_loads=6, wide_stores=18),
    "loss_fp32_d8192_stats": _loss("fp32", 8192, stats=True, registers=128, wide_loads=12, wide_stores=20),
    "loss_bf16_d8192": _loss("bf16", 8192, registers=80, wide_loads=4, wide_stores=2),
    "loss_fp32_d16384": _loss("fp32", 16384, registers=128, wide_loads=16, wide_stores=8),
    "loss_bf16_d256_local": _loss("bf16", 256, local=True, registers=64, wide_loads=5, wide_stores=2),
    "loss_fp32_d8192_local_stats": _loss(
        "fp32", 8192, stats=True, local=True, registers=128, wide_loads=24, wide_stores=24
    ),
    "loss_bwd_bf16": _bwd("bf16"),
    "loss_bwd_bf16_local": _bwd("bf16", local=True),
    "loss_bwd_fp32": _bwd("fp32"),
    "max_pool_fwd_bf16": _max_pool(backward=False),
    "max_pool_bwd_bf16": _max_pool(backward=True),
    "ema_fp32": _multi(_EMA, 80, 8, 4, DTYPE_COMBOS=((F32, F32, F32),), HAS_COPY=False),
    "ema_fp32_copy_bf16": _multi(_EMA, 96, 8, 6, DTYPE_COMBOS=((F32, F32, BF16),), HAS_COPY=True),
    "ema_fp32_from_bf16": _multi(_EMA, 80, 6, 4, DTYPE_COMBOS=((F32, BF16, F32),), HAS_COPY=False),
    "ema_two_dtype_combos": _multi(_EMA, 96, 14, 8, DTYPE_COMBOS=((F32, F32, F32), (F32, BF16, F32)), HAS_COPY=False),
    "running_stats_fp32": _statistics((F32, F32, F32, F32)),
    "lars_norms_fp32": _multi(_NORMS, 64, 8, 0, DTYPE_COMBOS=((F32, F32),)),
    "lars_norms_bf16_grad": _multi(_NORMS, 64, 6, 0, DTYPE_COMBOS=((F32, BF16),)),
    "lars_norms_two_dtype_combos": _multi(_NORMS, 64, 14, 0, DTYPE_COMBOS=((F32, BF16), (F32, F32))),
    "lars_norms_fp32_no_flag": _multi(_NORMS, 64, 8, 0, DTYPE_COMBOS=((F32, F32),), found_inf_ptr=None),
    "lars_apply": _multi(_APPLY, 128, 12, 8, DTYPE_COMBOS=(_ALL_F32,), **_has()),
    "lars_apply_ema": _multi(_APPLY, 128, 16, 12, DTYPE_COMBOS=(_ALL_F32,), **_has(target=True)),
    "lars_apply_ema_copies": _multi(
        _APPLY, 128, 16, 16, DTYPE_COMBOS=((F32, F32, F32, F32, BF16, BF16),), **_has(target=True, copies=True)
    ),
}


def main() -> None:
    """Print registers, widths and spills of every kernel on every architecture."""
    print(f"triton {triton.__version__}")
    print("| kernel | sm | registers | stack | spills | 128-bit loads | 128-bit stores | instructions |")
    print("|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for capability in CAPABILITIES:
            code = compile_for(case, capability)
            print(
                f"| {name} | {capability} | {code.registers} | {code.stack} | {code.spills} | {code.wide_loads} | "
                f"{code.wide_stores} | {code.instructions.total()} |"
            )


if __name__ == "__main__":
    main()
