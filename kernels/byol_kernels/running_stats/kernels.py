"""Triton kernel of the running statistics of batch norms, and its launcher."""

from collections.abc import Sequence

from torch import Tensor

from byol_kernels._multi_tensor import Column, MultiTensorPlan
from byol_kernels._triton import device_guard, jit, tl, tl_dtype

BLOCK_C = 1024
NUM_WARPS = 4


@jit
def _update_layer(
    addresses_ptr: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    num_channels: tl.tensor,
    num_splits: tl.tensor,
    momentum: tl.tensor,
    count: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Update both running statistics of one layer, once per split."""
    ACC: tl.constexpr = tl.float64 if DTYPES[0] == tl.float64 else tl.float32
    mean_ptr = tl.load(addresses_ptr + row).to(tl.pointer_type(DTYPES[0]))
    var_ptr = tl.load(addresses_ptr + num_rows + row).to(tl.pointer_type(DTYPES[1]))
    batch_mean_ptr = tl.load(addresses_ptr + 2 * num_rows + row).to(tl.pointer_type(DTYPES[2]))
    batch_var_ptr = tl.load(addresses_ptr + 3 * num_rows + row).to(tl.pointer_type(DTYPES[3]))
    start = 0
    while start < num_channels:
        channels = start + tl.arange(0, BLOCK_C)
        mask = channels < num_channels
        mean = tl.load(mean_ptr + channels, mask=mask, other=0.0).to(ACC)
        var = tl.load(var_ptr + channels, mask=mask, other=0.0).to(ACC)
        split = 0
        while split < num_splits:
            # Every split counts as a batch; a negative momentum asks for the cumulative average.
            cumulative = tl.div_rn(1.0, (count + split + 1).to(tl.float32)).to(tl.float64)
            weight = tl.where(momentum < 0.0, cumulative, momentum).to(ACC)
            offsets = split * num_channels + channels
            mean = (1.0 - weight) * mean + weight * tl.load(batch_mean_ptr + offsets, mask=mask, other=0.0).to(ACC)
            var = (1.0 - weight) * var + weight * tl.load(batch_var_ptr + offsets, mask=mask, other=0.0).to(ACC)
            split += 1
        tl.store(mean_ptr + channels, mean.to(DTYPES[0]), mask=mask)
        tl.store(var_ptr + channels, var.to(DTYPES[1]), mask=mask)
        start += BLOCK_C


@jit
def _update_running_stats_kernel(
    addresses_ptr: tl.tensor,  # [5, R] int64: running mean, running variance, batch means, batch variances, counter
    rows_ptr: tl.tensor,  # [R, 4] int64: channels, dtype combination, first chunk, flags = number of splits
    momentum_ptr: tl.tensor,  # [R] float64; negative: cumulative average
    num_rows: tl.tensor,
    found_inf_ptr: tl.tensor,  # [] or None
    DTYPE_COMBOS: tl.constexpr,  # dtypes of the first four columns that occur
    BLOCK_C: tl.constexpr,
) -> None:
    # --- skipped step: selected, not multiplied by zero, because 0 * NaN is NaN
    if found_inf_ptr is not None:  # noqa: SIM102 - decided when compiled; the next one at run time
        if tl.load(found_inf_ptr) != 0.0:
            return
    # --- the layer of this program: a network has about a hundred, of at most some thousand channels.
    row = tl.program_id(0)
    num_channels = tl.load(rows_ptr + 4 * row)
    dtype_combo = tl.load(rows_ptr + 4 * row + 1)
    num_splits = tl.load(rows_ptr + 4 * row + 3)
    momentum = tl.load(momentum_ptr + row)
    counter_address = tl.load(addresses_ptr + 4 * num_rows + row)
    counter_ptr = counter_address.to(tl.pointer_type(tl.int64))
    count = tl.load(counter_ptr, mask=counter_address != 0, other=0)

    # --- update, with the dtypes of the layer
    for k in tl.static_range(len(DTYPE_COMBOS)):
        if dtype_combo == k:
            _update_layer(
                addresses_ptr, row, num_rows, num_channels, num_splits, momentum, count, DTYPE_COMBOS[k], BLOCK_C
            )  # fmt: skip
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counter_ptr, count + num_splits, mask=counter_address != 0)


def update_running_stats(
    plan: MultiTensorPlan, columns: Sequence[Column], *, momentum: Sequence[float], found_inf: Tensor | None
) -> None:
    """Launch the update of all layers.

    Args:
        plan: of the lists; flags are the numbers of splits.
        columns: lists of running means, running variances, batch means, batch variances, counters.
        momentum: per layer; negative for the cumulative average.
        found_inf: flag, 0-dim; nothing is written where it is not 0.
    """
    running_mean = columns[0].tensors
    tables = plan.tables(columns)
    momentum_table = plan.constant("momentum", "d", momentum, running_mean[0].device)
    with device_guard(running_mean[0]):
        _update_running_stats_kernel[(len(running_mean),)](
            tables.addresses, tables.rows, momentum_table, len(running_mean), found_inf,
            DTYPE_COMBOS=tuple(tuple(map(tl_dtype, combo[:4])) for combo in plan.dtype_combos), BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
