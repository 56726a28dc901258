"""Family of a GPU kernel, or of an operation on a CPU, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES = (
    "conv forward", "conv dgrad", "conv wgrad", "conv backward", "matmul", "attention", "batch norm", "norm",
    "pointwise", "pool", "loss", "optimizer + EMA", "augmentation", "copies", "other",
)  # fmt: skip

# The first match decides. Names are those of cuDNN, CUTLASS, cuBLAS, ATen, byol_kernels and inductor, which names a
# kernel after the fused operations.
_FUSED = r"^triton_(poi|red|per|for)_"  # of operations that multiply no matrices, also where the name holds theirs
_KERNELS = [
    ("batch norm", _FUSED + r".*batch_norm"),
    ("pool", _FUSED + r".*pool"),
    ("pointwise", _FUSED),
    ("copies", r"^memcpy|^memset|copy_kernel|direct_copy|CatArray|nchwToNhwc|nhwcToNchw|transpose_kernel"),
    ("loss", r"normalized_mse"),
    ("optimizer + EMA", r"_lars_|_ema_update|multi_tensor_apply|foreach|_amp_|amp_update|fused_adam"),
    ("augmentation", r"_(photometric|gaussian_blur|sample_view_params|resized_crop)|dali|nvimgcodec|jpeg|huffman|idct"),
    ("conv dgrad", r"dgrad|bwd_data|backward_data"),
    ("conv wgrad", r"wgrad|bwd_filter|backward_filter|bwd_weight"),
    ("attention", r"flash|fmha|attention"),
    ("conv forward", r"fprop|implicit_gemm|convolve|conv2d|conv_depthwise|winograd|cudnn.*conv|convolution"),
    ("batch norm", r"batch_norm|batchnorm|\bbn_|_bn_"),
    ("norm", r"layer_norm|layernorm|softmax|rms_norm|group_norm|welford|RowwiseMoments"),
    ("pool", r"pool"),
    ("matmul", r"gemm|cutlass|nvjet|cublas|splitk|\bmm_|_mm_|addmm"),
    ("pointwise", r"elementwise|triton_|vectorized|reduce_kernel|threshold|relu|gelu|silu|sigmoid|dropout|index"),
]  # fmt: skip
_OPS = [
    ("conv backward", r"convolution_backward|conv.*_backward"),
    ("conv forward", r"conv"),
    ("batch norm", r"batch_norm"),
    ("norm", r"layer_norm|softmax|group_norm|rms_norm"),
    ("attention", r"attention"),
    ("matmul", r"::(addmm|mm|bmm|baddbmm|linear|mkldnn_linear)"),
    ("pool", r"pool|::mean|::sum"),
    ("loss", r"normalized_mse"),
    ("optimizer + EMA", r"_foreach|_amp_|lars|ema_update|lerp"),
    ("augmentation", r"photometric|gaussian_blur|sample_view_params|resized_crop|upsample|decode|image::"),
    ("copies", r"::(copy_|_to_copy|cat|contiguous|clone|index|stack)"),
    ("pointwise", r"aten::"),
]  # fmt: skip


def _compiled(rules: Iterable[tuple[str, str]]) -> list[tuple[str, re.Pattern[str]]]:
    return [(family, re.compile(pattern, re.IGNORECASE)) for family, pattern in rules]


_KERNEL_RULES, _OP_RULES = _compiled(_KERNELS), _compiled(_OPS)


def family_of(name: str, *, on_gpu: bool) -> str:
    """Family of a kernel or operation, one of `FAMILIES`.

    Args:
        name: of a GPU kernel, or of an ATen operation (`aten::add_`).
        on_gpu: True for a GPU kernel.
    """
    for family, pattern in _KERNEL_RULES if on_gpu else _OP_RULES:
        if pattern.search(name):
            return family
    return "other"
