"""GPUs with known speeds: data sheets, and the measured shares of them. Needs no torch."""

from __future__ import annotations

from byol_fast.config import ConfigError

# Data sheets, dense, no sparsity: TFLOP/s of bf16 = fp16 (fp32 accumulation), tf32, fp32; TB/s.
# A100 80GB SXM: NVIDIA A100 data sheet. H100 SXM, H200 SXM: NVIDIA H100 and H200 data sheets (989.4 with the sparsity
# factor taken out). RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A.
SHEETS: dict[str, tuple[float, float, float, float]] = {
    "A100": (312.0, 156.0, 19.5, 2.039),
    "H100": (989.4, 494.7, 66.9, 3.35),
    "H200": (989.4, 494.7, 66.9, 4.8),
    "RTX 4090": (165.2, 82.6, 82.6, 1.008),
}
# Achieved copies: 3.0 of the H100's 3.35 TB/s, 4.3 of the H200's 4.8; achieved products: 798 of Hopper's 989.4 TFLOP/s.
# Not measured for the other two GPUs, which get the shares of Hopper.
COPY_TB: dict[str, float] = {"H100": 3.0, "H200": 4.3}
COPY_SHARE = 3.0 / 3.35
PRODUCT_SHARE = 798 / 989.4
GPUS = tuple(SHEETS)


def gpu_name(gpu: str) -> str:
    """Name of a GPU in `GPUS` from another spelling of it: any case, `4090`.

    Raises:
        ConfigError: another GPU.
    """
    names = {name.lower(): name for name in GPUS} | {"4090": "RTX 4090", "rtx4090": "RTX 4090"}
    if gpu.lower() not in names:
        raise ConfigError(
            f"roofline: gpu must be one of {', '.join(GPUS)}, got {gpu!r}; --measure measures this machine"
        )
    return names[gpu.lower()]
