"""`photometric` as an operator: into a given output, compiled, what is refused, launches on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from byol_kernels import photometric
from tests.gpu import DEVICE, NOT_HERE, Captured, host_syncs_are_errors, launches
from tests.kernels.conftest import INTERPRETED, Record, not_interpreted
from tests.kernels.torchvision_reference import make_images, make_params, on

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# -------------------------------------------------------------------------------- into a given output


OUT_CASES = list(itertools.product([torch.uint8, torch.bfloat16], [8, 9, 70]))


@pytest.mark.parametrize(("dtype", "size"), [OUT_CASES[1], OUT_CASES[3]] if INTERPRETED else OUT_CASES)
def test_out_is_slice_of_buffer(dtype: torch.dtype, size: int, device: str) -> None:
    """A view of a [V, B, C, H, W] buffer, and some of its rows: written in place, and nothing around them."""
    x, p = make_images(4, size, size).to(device), on(device, make_params(4))
    before = x.clone()
    buffer = torch.full((3, 4, size, size, 3), 77, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)
    expected = photometric(x, **p, dtype=dtype)
    assert photometric(x, **p, dtype=dtype, out=buffer[1]).data_ptr() == buffer[1].data_ptr()
    rows = {name: values[1:3] for name, values in p.items()}
    photometric(x[1:3], **rows, dtype=dtype, out=buffer[2, 1:3])
    assert torch.equal(buffer[1], expected) and torch.equal(buffer[2, 1:3], expected[1:3])
    assert (buffer[0] == 77).all() and (buffer[2, ::3] == 77).all()
    assert torch.equal(x, before)


def refused_outputs() -> dict[str, tuple[Callable[[], Any], str]]:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    out = x.clone(memory_format=torch.channels_last)
    memory = torch.zeros(200, dtype=torch.uint8)
    overlapping, last = (memory[start : start + 96].view(2, 4, 4, 3).permute(0, 3, 1, 2) for start in (0, 95))
    return {
        "shape": (lambda: photometric(x, out=out[:1]), r"out must be \(2, 3, 4, 4\), torch\.uint8, on cpu"),
        "dtype": (lambda: photometric(x, dtype=torch.float32, out=out), "torch.float32, .*got .*torch.uint8"),
        "device": (lambda: photometric(x, out=out.to("meta")), "got .*on meta; allocate it to match"),
        "planar": (lambda: photometric(x, out=x.clone()), r"out must be dense in channels_last, got strides \(48, 16"),
        "gaps": (lambda: photometric(x, out=out.repeat(2, 1, 1, 1)[::2]), "out must be dense in channels_last"),
        "in_place": (lambda: photometric(out, out=out), "out must not share memory with images"),
        "overlap": (lambda: photometric(overlapping, out=last), "out must not share memory with images"),
    }


REFUSED_OUTPUTS = refused_outputs()


@pytest.mark.parametrize(("call", "message"), REFUSED_OUTPUTS.values(), ids=REFUSED_OUTPUTS)
def test_out_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"photometric: .*{message}"):
        call()


# -------------------------------------------------------------------------------- as an operator


def test_one_operator_per_call(device: str) -> None:
    x, p = make_images(3, 8, 16).to(device), on(device, make_params(3))
    with Record() as record:
        photometric(x, **p, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert [name for name in record.names if "empty" not in name] == ["byol_kernels.photometric_out.default"]


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    x, p = make_images(3, 8, 16).to(device), on(device, make_params(3))
    normalize = ([], []) if dtype == torch.uint8 else (list(MEAN), list(STD))
    out = torch.empty((2, 3, 8, 16, 3), dtype=dtype, device=device).permute(0, 1, 4, 2, 3)[1]
    op = torch.ops.byol_kernels.photometric_out
    torch.library.opcheck(op, (x, *p.values(), 128, *normalize, False, out))
    torch.library.opcheck(op, (x, *[None] * len(p), 128, *normalize, True, out))


@not_interpreted
def test_compiles_without_graph_breaks(device: str) -> None:
    x, p = make_images(3, 8, 16).to(device), on(device, make_params(3))

    def views(x: Tensor, p: dict[str, Any], out: Tensor) -> Tensor:
        photometric(x, **p, mean=MEAN, std=STD, dtype=torch.float32, out=out[1])
        return photometric(x, **p, mean=MEAN, std=STD, dtype=torch.float32) * 2

    outs = [torch.zeros((2, 3, 8, 16, 3), device=device).permute(0, 1, 4, 2, 3) for _ in range(2)]
    compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, p, outs[0]), views(x, p, outs[1])) and torch.equal(*outs)


X, N = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float_images": (lambda: photometric(X.float()), r"images must be torch\.uint8, got torch\.float32"),
    "nhwc": (lambda: photometric(X.permute(0, 2, 3, 1)), r"must be \[batch, 3, .*permute\(0, 3, 1, 2\)"),
    "one_image": (lambda: photometric(X[0]), r"got shape \(3, 4, 4\)"),
    "mask_rows": (lambda: photometric(X, flip=N(3, dtype=torch.bool)), r"flip must have shape \(2,\), got \(3,\)"),
    "mask_dtype": (lambda: photometric(X, solarize=N(2)), r"solarize must be torch\.bool"),
    "factors_columns": (lambda: photometric(X, factors=N(2, 3), order=N(2, 4)), r"factors must have shape \(2, 4\)"),
    "factors_dtype": (lambda: photometric(X, factors=N(2, 4).double(), order=N(2, 4).int()), r"\.to\(torch\.float32\)"),
    "order_dtype": (lambda: photometric(X, factors=N(2, 4), order=N(2, 4)), "order must be torch.int32 or torch.int64"),
    "order_missing": (lambda: photometric(X, factors=N(2, 4)), "factors and order must come together.*no order"),
    "jitter_alone": (lambda: photometric(X, jitter=N(2, dtype=torch.bool)), "no factors and no order"),
    "kernel_size_missing": (lambda: photometric(X, sigma=N(2)), "sigma and kernel_size must come together"),
    "device": (lambda: photometric(X, flip=N(2, dtype=torch.bool, device="meta")), "flip must be on the device of"),
    "dtype": (lambda: photometric(X, dtype=torch.int32), "dtype must be torch.uint8, torch.bfloat16"),
    "std_missing": (lambda: photometric(X, mean=MEAN, dtype=torch.float32), "std must be three numbers"),
    "mean_of_one": (lambda: photometric(X, mean=[0.5], std=STD, dtype=torch.float32), "mean must be three numbers"),
    "std_zero": (lambda: photometric(X, mean=MEAN, std=(1, 0, 1), dtype=torch.float32), "all from 1e-06 to"),
    "uint8_normalized": (lambda: photometric(X, mean=MEAN, std=STD), "dtype must be floating point with mean and std"),
}


@not_interpreted
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------- only on a GPU


@pytest.mark.gpu("launches")
def test_launches_and_host_syncs() -> None:
    torch.use_deterministic_algorithms(False)  # it fills every torch.empty, which is a launch each
    x, p = make_images(16, 64, 64).to(DEVICE), make_params(16)
    there = on(DEVICE, p)
    assert launches(lambda: photometric(x, **there)) in (["_photometric_kernel", "_gaussian_blur_kernel"], NOT_HERE)
    sharp = {name: values for name, values in there.items() if name not in ("blur", "sigma", "kernel_size")}
    assert launches(lambda: photometric(x, **sharp)) in (["_photometric_kernel"], NOT_HERE)
    nowhere = torch.zeros(16, dtype=torch.bool)  # known on the host
    kernels = launches(lambda: photometric(x, **{**there, "blur": nowhere}))
    assert kernels is NOT_HERE or [n for n in kernels if "kernel" in n.lower()] == ["_photometric_kernel"]
    expected = photometric(x, **there)
    with host_syncs_are_errors():
        out = photometric(x, **there)
        from_host = photometric(x, **p._asdict())
    assert torch.equal(out, expected) and torch.equal(from_host, expected)


@pytest.mark.gpu("launches")
def test_captured_view_follows_its_parameters() -> None:
    x, p = make_images(16, 64, 64).to(DEVICE), on(DEVICE, make_params(16))
    photometric(x, **p)
    graph = Captured(lambda: photometric(x, **p))
    for seed in (1, 2):
        for name, values in on(DEVICE, make_params(16, seed=seed)).items():
            p[name].copy_(values)
        out = graph.replay()
        assert torch.equal(out, photometric(x, **p))
