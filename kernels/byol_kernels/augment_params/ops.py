"""`sample_view_params`: augmentation parameters of one view, sampled on the device without work on the host."""

import torch
from torch import Tensor

from byol_kernels.augment_params import kernels, reference
from byol_kernels.augment_params.params import TABLE_COLUMNS, ViewParams, empty_params
from byol_kernels.derivatives import register_autograd

# -------------------------------------------------------------------------------- operator

torch.library.define(
    "byol_kernels::sample_view_params",
    f"(Tensor index, Tensor key, Tensor table, int blur_kernel) -> ({', '.join(['Tensor'] * len(ViewParams._fields))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _sample_view_params_fake(index: Tensor, key: Tensor, table: Tensor, blur_kernel: int) -> ViewParams:
    return empty_params(index)


def _refuse_backward(ctx: object, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "sample_view_params: table must not require a gradient, got a backward pass; detach it, the samples have no "
        "derivative"
    )


torch.library.impl("byol_kernels::sample_view_params", "CPU", reference.sample_view_params)
torch.library.impl("byol_kernels::sample_view_params", "CUDA", kernels.sample_view_params_cuda)
torch.library.register_fake("byol_kernels::sample_view_params", _sample_view_params_fake)
register_autograd("sample_view_params", _refuse_backward)

# -------------------------------------------------------------------------------- public function


def sample_view_params(index: Tensor, key: Tensor, table: Tensor, *, blur_kernel: int = 0) -> ViewParams:
    """Sample crop, color jitter, blur and masks of one view of each image; one launch on a GPU.

    They depend on the key and the number of the image alone, and are the same on every device, bit for bit.

    Args:
        index: numbers of the images, [B] int64.
        key: key of the random stream, [] int64: a hash of a seed, the epoch and the view, say.
        table: ranges and probabilities, float64, with the columns `augment_params.params.TABLE_COLUMNS`.
        blur_kernel: largest width of the blur kernel in pixels, odd; 0 for three sigma to each side.

    Returns:
        Arguments of `resized_crop` and `photometric`, on the device of `index`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a blur_kernel that is negative or even.

    Examples:
        >>> table = torch.tensor([.08, .92, -.29, .58, .1, 1.9, .6, .6, .8, -.1, .8, .8, .4, .2,
        ...                       .5, .8, .2, 1., 0., 32, 32, 32, 32, 32], dtype=torch.float64)
        >>> sample_view_params(torch.arange(7), torch.tensor(42), table).crop_box.shape
        torch.Size([7, 4])
    """
    if blur_kernel != 0 and (blur_kernel < 0 or blur_kernel % 2 == 0):
        raise ValueError(f"sample_view_params: blur_kernel must be 0 or odd, got {blur_kernel}; the paper's is 23")
    for name, numbers, shape, dtype in (
        ("index", index, index.shape[:1], torch.int64),
        ("key", key, (), torch.int64),
        ("table", table, (len(TABLE_COLUMNS),), torch.float64),
    ):
        if tuple(numbers.shape) != tuple(shape) or numbers.dtype != dtype or numbers.device != index.device:
            raise ValueError(
                f"sample_view_params: {name} must have shape {tuple(shape)} and dtype {dtype}, on the device of index, "
                f"{index.device}, got {tuple(numbers.shape)}, {numbers.dtype}, {numbers.device}; convert it with .to()"
            )
    return ViewParams(*torch.ops.byol_kernels.sample_view_params(index, key, table, blur_kernel))
