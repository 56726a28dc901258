"""The machine code of what a GPU really ran: Triton's own object of each launch, taken apart.

`test_aot_sass.py` compiles what a launch is thought to ask for; here the launch itself says it: alignments and
divisible numbers as Triton found them, this GPU's architecture, this version's assembler. A rehearsal takes the
compiler's object for sm_90 in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import sample_augment_params
from byol_kernels import (
    LARS,
    byol_loss,
    byol_loss_with_stats,
    ema_update_,
    gaussian_blur,
    max_pool2d_3x3,
    photometric,
    resized_crop,
)
from byol_kernels.photometric.params import VALUES, PhotometricParams
from tests.gpu import DEVICE, REHEARSING
from tests.kernels.conftest import not_interpreted
from tests.kernels.numerics import randn

sass = pytest.importorskip("tests.kernels.sass", exc_type=ImportError)  # needs Triton
augment_sass = pytest.importorskip("tests.kernels.augment_sass", exc_type=ImportError)

pytestmark = [pytest.mark.gpu("sass"), not_interpreted]


class Launch(NamedTuple):
    """A call of a public function, and the kernels it must have launched, by the names of cases of the AOT tests."""

    call: Callable[[], object]
    cases: tuple[str, ...]


def _loss(dtype: torch.dtype, *, stats: bool = False, num_local: int = 0) -> Callable[[], object]:
    def call() -> object:
        shapes = [(256, 256)] * 4 + [(num_local, 256, 256)] * (num_local > 0)
        inputs = [randn(shape, seed, dtype, device=DEVICE) for seed, shape in enumerate(shapes)]
        predictions = [x.requires_grad_() for x in (*inputs[:2], *inputs[4:])]
        loss = byol_loss_with_stats(*inputs)[0] if stats else byol_loss(*inputs)
        return torch.autograd.grad(loss, predictions)

    return call


def _weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of many full chunks, and one that is none."""
    return [randn(shape, i, dtype, device=DEVICE) for i, shape in enumerate(((512, 1024), (64, 64, 3, 3), (256,)))]


def _ema(online: torch.dtype, *, copies: bool = False) -> Callable[[], object]:
    def call() -> None:
        targets = _weights()
        low = [t.bfloat16() for t in targets] if copies else None
        ema_update_(targets, _weights(online), torch.tensor(0.9, device=DEVICE), copies=low)

    return call


def _lars(*, ema: bool, copies: bool) -> Callable[[], object]:
    def call() -> None:
        params, targets = [nn.Parameter(w) for w in _weights()], _weights()
        for p, g in zip(params, _weights(), strict=True):
            p.grad = g
        low = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (*params, *targets)} if copies else None
        optimizer = LARS(params, torch.tensor(0.1, device=DEVICE))
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        target_of = dict(zip(params, targets, strict=True))
        optimizer.step(ema=(target_of, torch.tensor(0.9, device=DEVICE)) if ema else None, copies=low)

    return call


def _images(names: tuple[str, ...]) -> tuple[Tensor, dict[str, Any]]:
    pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    params = sample_augment_params(ViewConfig(solarize_p=0.2), np.arange(4), seed=0, epoch=0, view=0)
    return pixels.to(DEVICE), {name: torch.from_numpy(getattr(params, name)).to(DEVICE) for name in names}


BLUR = ("blur", *VALUES["blur"])
COLOR = tuple(name for name in PhotometricParams._fields if name not in BLUR)


def _photometric(names: tuple[str, ...], dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        pixels, params = _images(names)
        return photometric(pixels, **params, dtype=dtype, mean=(0.5,) * 3, std=(0.2,) * 3)

    return call


def _blur() -> object:
    pixels, params = _images(BLUR)
    return gaussian_blur(pixels, **params)


def _crop() -> object:
    pixels, _ = _images(())
    box = torch.tensor([[0, 0, 224, 224]] * 4, dtype=torch.int32, device=DEVICE)
    return resized_crop(pixels, box, 32, index=torch.arange(4, device=DEVICE))


def _max_pool() -> object:
    x = torch.ones(2, 64, 112, 112, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = max_pool2d_3x3(x.requires_grad_())
    return torch.autograd.grad(y, x, torch.ones_like(y))


LAUNCHES = {
    "loss_bf16": Launch(_loss(torch.bfloat16), ("loss_bf16_d256", "loss_bwd_bf16")),
    "loss_fp16": Launch(_loss(torch.float16), ("loss_fp16_d256",)),
    "loss_fp32": Launch(_loss(torch.float32), ("loss_fp32_d256", "loss_bwd_fp32")),
    "loss_bf16_stats": Launch(_loss(torch.bfloat16, stats=True), ("loss_bf16_d256_stats",)),
    "loss_bf16_local": Launch(_loss(torch.bfloat16, num_local=6), ("loss_bf16_d256_local", "loss_bwd_bf16_local")),
    "ema_fp32": Launch(_ema(torch.float32), ("ema_fp32",)),
    "ema_fp32_from_bf16": Launch(_ema(torch.bfloat16), ("ema_fp32_from_bf16",)),
    "ema_fp32_copy_bf16": Launch(_ema(torch.float32, copies=True), ("ema_fp32_copy_bf16",)),
    "lars": Launch(_lars(ema=False, copies=False), ("lars_norms_fp32", "lars_apply")),
    "lars_ema": Launch(_lars(ema=True, copies=False), ("lars_norms_fp32", "lars_apply_ema")),
    "lars_ema_copies": Launch(_lars(ema=True, copies=True), ("lars_norms_fp32", "lars_apply_ema_copies")),
    "max_pool": Launch(_max_pool, ("max_pool_fwd_bf16", "max_pool_bwd_bf16")),
    "photometric_bf16": Launch(_photometric((*COLOR, *BLUR), torch.bfloat16), ("photometric_bf16", "blur_u8_to_bf16")),
    "photometric_bf16_no_blur": Launch(_photometric(COLOR, torch.bfloat16), ("photometric_bf16_no_blur",)),
    "photometric_fp32": Launch(_photometric((*COLOR, *BLUR), torch.float32), ("photometric_fp32",)),
    "blur_u8": Launch(_blur, ("blur_u8",)),
    "crop_32": Launch(_crop, ("crop_32",)),
}


def expected(name: str) -> tuple[str, Any]:
    """Name of a case's kernel, and the case."""
    for module in (sass, augment_sass):
        if name in module.CASES:
            case = module.CASES[name]
            return case.kernel.__name__, case
    raise KeyError(name)


def run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Make the call; the code of what it launched, by the kernel's name."""
    found: dict[str, list[Any]] = {}
    if REHEARSING:
        launch.call()
        for name in launch.cases:
            kernel, case = expected(name)
            code = sass.compile_for(case, 90) if isinstance(case, sass.Case) else augment_sass.build(case, 90)[1]
            found.setdefault(kernel, []).append(code)
        return found
    import triton

    jitted = triton.runtime.JITFunction
    original = jitted.run

    def recording(self: Any, *args: Any, **options: Any) -> Any:
        compiled = original(self, *args, **options)
        found.setdefault(self.__name__, []).append(sass.read(compiled.asm["cubin"]))
        return compiled

    monkeypatch.setattr(jitted, "run", recording)
    launch.call()
    return found


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_ran_is_what_was_promised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LAUNCHES[name]
    ran = run(launch, monkeypatch)
    for case_name in launch.cases:
        kernel, case = expected(case_name)
        assert kernel in ran, f"{case_name}: {kernel} was not launched, only {sorted(ran)}"
        for code in ran[kernel]:
            about = f"{case_name}: {code.registers} registers, {code.stack} B of stack, {code.spills} spills, loads "
            about += f"{code.count(r'LDG.*')} ({code.wide_loads} wide), stores {code.count(r'STG.*')} "
            about += f"({code.wide_stores} wide)"
            print(about)
            assert code.spills == 0 and code.stack == 0, about
            assert code.registers <= case.registers, about
            if isinstance(case, sass.Case):
                assert code.wide_loads >= case.wide_loads and code.wide_stores >= case.wide_stores, about
            else:
                for kind, widths in (("LDG", case.loads), ("STG", case.stores)):
                    for width, least in widths.items():
                        assert augment_sass.accesses(code, kind, width) >= least, f"{about}, {kind} of {width} bits"
