"""Precision of the products of frozen features, and the process's setting of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.evaluate import PretrainedEncoder, evaluate_retrieval
from byol_fast.utils.precision import fp32_matmul
from tests.evaluate.helpers import labeled_images, run

BACKENDS: Any = torch.backends
MATMUL = BACKENDS.cuda.matmul


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The settings that another test finds."""
    settings = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    yield
    torch.set_float32_matmul_precision("highest")
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("before", ["highest", "high", "medium", "tf32 of the backend"])
def test_setting_is_restored(before: str) -> None:
    """Of torch's two settings of the precision of products: one cannot be read where the other was used."""
    torch.set_float32_matmul_precision("highest")
    if before == "tf32 of the backend":
        MATMUL.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(before)
    expected = MATMUL.fp32_precision
    assert expected == ("ieee" if before == "highest" else "tf32")
    with pytest.raises(KeyError), fp32_matmul():
        assert MATMUL.fp32_precision == "ieee"
        raise KeyError
    assert MATMUL.fp32_precision == expected
    if before != "tf32 of the backend":
        assert torch.get_float32_matmul_precision() == before


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the precision of a GPU's products at each product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}:
            is_double = args[-1].dtype == torch.float64
            self.precisions.append("float64" if is_double else MATMUL.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_reference", "retrieval"])
def test_products_of_frozen_features_are_at_least_fp32(protocol: str, pretrained: PretrainedEncoder) -> None:
    train, test = labeled_images(30, 0), labeled_images(15, 1)
    with Products() as products:
        if protocol == "retrieval":
            evaluate_retrieval(pretrained, test, device="cpu", threads=1, precision="tf32")
        else:
            run(protocol, pretrained, train, test, precision="tf32")
    assert set(products.precisions) == {"float64" if protocol == "retrieval" else "ieee"}
    assert MATMUL.fp32_precision == "tf32"
