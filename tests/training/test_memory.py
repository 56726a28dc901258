"""Memory before the first step: the estimate beside torch's profiler and a GPU, and what is refused."""

from __future__ import annotations

import gc
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.data import Batch, open_train_val
from byol_fast.data.augment import PIXELS_PER_CHUNK
from byol_fast.data.batch import empty_views
from byol_fast.models import encoders
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.builder import build_model
from byol_fast.optim import build_optimizer
from byol_fast.training import memory
from byol_fast.training.distributed import World
from byol_fast.training.memory_estimate import GIB, MemoryEstimate, estimate_memory
from byol_fast.training.messages import startup_summary
from byol_fast.training.train_step import TrainStep
from byol_fast.training.trainer import Trainer
from byol_fast.utils.memory import AvailableMemory, available_memory
from byol_fast.utils.precision import Precision
from tests.networks import SmallResidualNetwork
from tests.training.helpers import BF16, FP32, SCHEDULE

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks/results/h200"
TOLERANCE = 0.15
"""Largest relative error of an estimate: what it promises."""


def peak_of_two_steps(config: Config, precision: Precision) -> int:
    """Largest sum of the allocations less the frees that torch's profiler counts, from the networks on."""
    gc.collect()  # the networks of other tests are not to be freed, and subtracted, meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config).to(memory_format=torch.channels_last)
        if config.activation_checkpointing:
            checkpoint_blocks(model.encoder)
        optimizer = build_optimizer(config.optim, model.trainable_parameters())
        steps = config.grad_accum_steps
        step = TrainStep(model, optimizer, SCHEDULE, precision=precision, grad_accum_steps=steps)
        for number in range(2):
            sizes = [view.size for view in config.view_configs]
            views = [empty_views(sizes, config.batch_size, device=CPU) for _ in range(steps)]
            for view in (view for batch in views for view in batch):
                view.random_(0, 256)
            step([Batch(batch, None, torch.arange(config.batch_size)) for batch in views], number)
    events: Any = profiler.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes)]).max())


def run_config(encoder: str, size: int, batch_size: int, **changes: Any) -> Config:
    fields = {"view1.size": size, "view2.size": size, "model.encoder": encoder, "model.zero_init_residual": False}
    return configs.replace(recipes.imagenet_resnet50(), {"batch_size": batch_size, **fields, **changes})


# With small heads the activations are most of the memory, those of the local views more than the tolerance.
THREE_SIZES = {"view2.size": 48, "num_local_views": 4, "local_view.size": 32}
THREE_SIZES |= {"model.hidden_dim": 32, "model.projection_dim": 16}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        pytest.param(run_config("resnet18", 32, 4, **{"optim.name": "sgd"}), FP32, id="resnet18, sgd"),
        pytest.param(run_config("resnet18_narrow", 32, 8, **{"model.cifar_stem": True}), BF16, id="small, bf16"),
        pytest.param(run_config("resnet18_narrow", 64, 16, **THREE_SIZES), FP32, id="narrow, views of three sizes"),
        pytest.param(
            run_config("resnet18_narrow", 64, 8, activation_checkpointing=True, grad_accum_steps=2),
            FP32,
            id="narrow, checkpointing, two batches",
        ),
        pytest.param(
            configs.replace(
                recipes.cifar10_lightly(), {"batch_size": 4, "view1.size": 16, "view2.size": 16, "grad_accum_steps": 2}
            ),
            FP32,
            id="cifar10_lightly, two batches",
        ),
        pytest.param(run_config("resnet18", 224, 16), FP32, id="resnet18", marks=pytest.mark.slow),
        pytest.param(run_config("resnet50", 224, 8), FP32, id="resnet50", marks=pytest.mark.slow),
        pytest.param(
            run_config("resnet50", 224, 8, activation_checkpointing=True),
            FP32,
            id="resnet50, checkpointing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            run_config("vit_b_16", 224, 2, **{"optim.name": "adamw"}),
            FP32,
            id="vit_b_16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_estimate_is_near_the_peak_of_the_profiler(config: Config, precision: Precision) -> None:
    measured = peak_of_two_steps(config, precision)
    assert estimate_memory(config, "cpu", precision).total == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("recipe", "item", "batch_size", "figure"),
    [
        ("cifar10_resnet18", "resnet18_cifar", 256, "byol_fast, eager, ready views, batch 256"),
        ("imagenet_resnet50", "resnet50_eager", 256, "byol_fast, eager, batch 256, cudnn.benchmark off"),
    ],
)
def test_estimate_for_a_gpu_is_near_the_measured_peak(recipe: str, item: str, batch_size: int, figure: str) -> None:
    """The peak of torch's allocator on an H200, from the committed results."""
    records = [json.loads(line) for line in (RESULTS / f"{item}.jsonl").read_text().splitlines()]
    (measured,) = (record["peak_gib"] for record in records if record.get("figure") == figure and "peak_gib" in record)
    config = configs.replace(recipes.get(recipe), {"batch_size": batch_size})
    assert estimate_memory(config, "cuda", BF16).total / GIB == pytest.approx(measured, rel=TOLERANCE)


def test_estimate_leaves_the_random_numbers(small_network: None) -> None:
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    estimate_memory(run_config("small", 32, 8), "cpu", FP32)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


def test_estimate_of_a_network_whose_widths_are_computed_from_tensors() -> None:
    """RegNets cannot be built on the meta device."""
    state = torch.get_rng_state()
    config = run_config("regnet_x_400mf", 32, 2, **{"model.hidden_dim": 64, "model.projection_dim": 16})
    estimate = estimate_memory(config, "cpu", FP32)
    assert torch.equal(state, torch.get_rng_state())
    model = build_model(config)
    tensors = [*model.parameters(), *model.buffers()]
    assert estimate.weights == sum(t.numel() * t.element_size() for t in tensors)
    trained = [p for p in model.trainable_parameters() if p.requires_grad]
    assert estimate.optimizer == 4 * sum(p.numel() for p in trained)


def test_more_processes_keep_their_gradients(small_network: None) -> None:
    """Between the steps too, in the buckets that DDP reduces: at the peak all are there."""
    config = run_config("small", 32, 64)
    one, two = (estimate_memory(config, "cpu", FP32, num_processes=n) for n in (1, 2))
    assert one.activations == two.activations
    assert 0 < two.total - one.total <= two.optimizer  # LARS has one number for each gradient


# -------------------------------------------------------------------------------- the check


@pytest.fixture
def checked(small: Config) -> Config:
    return configs.replace(small, {"memory_check": True, "batch_size": 32})


def needed(config: Config) -> int:
    """Bytes of a run on a CPU."""
    source, _ = open_train_val(config, None)
    return estimate_memory(config, "cpu", FP32).total + memory.loader_memory(config, source, CPU).machine


def leave(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: AvailableMemory(int(num_bytes), "this machine"))


def test_run_that_does_not_fit_is_refused_with_the_batch_that_does(
    checked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight, sixteen = (
        needed(configs.replace(checked, {"batch_size": size, "grad_accum_steps": 32 // size, "memory_check": False}))
        for size in (8, 16)
    )
    leave(monkeypatch, (eight + sixteen) / 2 / memory.WARNED)
    monkeypatch.setattr(memory, "REFUSED", 0.9)  # weights and loader are most of this run's memory
    expected = "batch of 32 images must fit .* 8 images would fit: --batch-size 8 --grad-accum-steps 4 keeps the learn"
    with pytest.raises(ConfigError, match=expected) as error:
        Trainer(checked)
    assert "--no-memory-check" in str(error.value)
    assert "--activation-checkpointing" in str(error.value)
    Trainer(configs.replace(checked, {"memory_check": False})).close()


@pytest.mark.parametrize(("share", "result"), [(0.8, "fits"), (0.9, "warned"), (1.1, "warned"), (1.2, "refused")])
def test_shares_of_the_available_memory(
    checked: Config, share: float, result: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "try_estimate", lambda *_, **__: MemoryEstimate(0, 0, 10**12, 0))
    monkeypatch.setattr(memory, "estimate_memory", lambda *_, **__: MemoryEstimate(0, 0, 10**12, 0))
    leave(monkeypatch, 10**12 / share)
    if result == "refused":
        with pytest.raises(ConfigError, match="not even 2 images fit"):
            Trainer(checked)
        return
    trainer = Trainer(checked)
    assert ("it may not fit" in caplog.text) == (result == "warned")
    (line,) = (line for line in startup_summary(trainer._parts) if line.startswith("memory: "))
    assert f"{10**12 / share / GIB:.1f} GiB on this machine" in line
    trainer.close()


@pytest.mark.parametrize(("swap", "is_refused"), [(0, True), (10**12, False)])
def test_run_that_fits_with_swap_is_warned_of(
    checked: Config,
    swap: int,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is slow, but the system does not end it."""
    source, _ = open_train_val(checked, None)
    for name in ("try_estimate", "estimate_memory"):
        monkeypatch.setattr(memory, name, lambda *_, **__: MemoryEstimate(0, 0, 2 * 10**12, 0))
    monkeypatch.setattr(memory, "available_memory", lambda: AvailableMemory(10**12, "this machine", swap))
    with pytest.raises(ConfigError) if is_refused else nullcontext():
        memory.check_memory(checked, source, CPU, FP32, World())
    assert ("200% of what is available" in caplog.text) == (not is_refused)


def test_memory_of_decoding_counts_one_largest_image(checked: Config, tmp_path: Path) -> None:
    """A panorama among small images, and one that is too large to be decoded at all, which is skipped."""
    for i, size in enumerate([(100, 100), (100, 100), (2000, 1000), (100, 100)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    config = configs.replace(checked, {"data.threads": 4, "data.builtin": "none", "data.root": tmp_path})
    small = configs.replace(config, {"data.threads": 1})
    source, _ = open_train_val(config, None)
    buffers = memory.CHUNK_COPIES * 3 * PIXELS_PER_CHUNK
    mean = (2_000_000 + 3 * 10_000) // 4
    demand = memory.loader_memory(config, source, CPU)
    assert demand.machine - memory.loader_memory(small, source, CPU).machine == 3 * (buffers + 2 * 3 * mean)
    header = bytearray((tmp_path / "0.png").read_bytes())
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    (tmp_path / "0.png").write_bytes(header)
    (tmp_path / "4.png").write_bytes((tmp_path / "1.png").read_bytes())
    other, _ = open_train_val(config, None)
    assert memory.loader_memory(config, other, CPU) == demand


def test_memory_of_waiting_batches_is_that_of_all_views(checked: Config) -> None:
    config = configs.replace(checked, {"view2.size": 20, "data.prefetch": 3, "grad_accum_steps": 2})
    source, _ = open_train_val(config, None)
    without = memory.loader_memory(config, source, CPU).machine
    config = configs.replace(config, {"num_local_views": 4, "local_view.size": 10})
    assert memory.loader_memory(config, source, CPU).machine - without == 6 * config.batch_size * 3 * 4 * 10**2
    config = configs.replace(config, {"view2.size": 30})
    larger = 4 * 10**2 + 30**2 - 20**2
    assert memory.loader_memory(config, source, CPU).machine - without == 6 * config.batch_size * 3 * larger


def test_processes_share_the_memory_of_their_machine(checked: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = open_train_val(checked, None)
    estimate = MemoryEstimate(GIB, 0, 0, 0)
    monkeypatch.setattr(memory, "try_estimate", lambda *_, **__: estimate)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_, **__: estimate)
    leave(monkeypatch, 3 * GIB)
    assert memory.check_memory(checked, source, CPU, FP32, World(local_size=2))
    with pytest.raises(ConfigError, match="this machine for each of 4 processes"):
        memory.check_memory(checked, source, CPU, FP32, World(local_size=4))


def test_encoder_that_needs_values_trains_without_an_estimate(checked: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class NeedsValues(SmallResidualNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)

    monkeypatch.setitem(encoders.OWN_ENCODERS, "small", lambda **_: NeedsValues())
    trainer = Trainer(configs.replace(checked, {"model.encoder": "small", "steps": 1, "knn.enabled": "off"}))
    assert [line for line in trainer._parts.notes if line.startswith("memory was not estimated: ")]
    assert trainer.fit().run_dir.exists()


# -------------------------------------------------------------------------------- what is available


def fake_proc(folder: Path, *, mounts: dict[str, str], groups: str, available_kib: int, swap_kib: int = 0) -> Path:
    """The files of /proc that tell the memory: mount points by type, the groups of the process, the machine's."""
    (folder / "self").mkdir()
    lines = [
        f"31 23 0:2{n} {root} {folder / kind} rw,relatime shared:9 - {kind} none rw{',memory' * (kind == 'cgroup')}"
        for n, (kind, root) in enumerate(mounts.items())
    ]
    lines.append("22 1 8:1 / /media/\udcff\u00a0usb rw - vfat /dev/sda1 rw")  # a name that is not UTF-8
    (folder / "self/mountinfo").write_text("\n".join(lines), errors="surrogateescape")
    (folder / "self/cgroup").write_text(groups)
    sizes = {"MemTotal": 99_999_999, "MemAvailable": available_kib, "SwapFree": swap_kib}
    (folder / "meminfo").write_text("".join(f"{name}:   {size} kB\n" for name, size in sizes.items()))
    return folder


def group(folder: Path, limit: str, used: int, **cached: int) -> None:
    """A control group, of version 2 below a folder of that name, else of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    is_v2 = "cgroup2" in folder.parts
    (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (folder / ("memory.current" if is_v2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in {"rss": 7, **cached}.items()))


def test_least_memory_of_nested_control_groups_of_version_2(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, mounts={"cgroup2": "/"}, groups="0::/pod/box\n", available_kib=9000)
    group(tmp_path / "cgroup2/pod/box", "max", 5000)
    assert available_memory(proc) == (9000 * 1024, "this machine", 0)
    group(tmp_path / "cgroup2/pod", "8000", 6000, active_file=500, inactive_file=1000)
    assert available_memory(proc) == (8000 - (6000 - 1500), "this control group", 0)
    group(tmp_path / "cgroup2/pod/box", "5500", 5000)
    assert available_memory(proc) == (500, "this control group", 0)


def test_least_memory_of_control_groups_of_version_1(tmp_path: Path) -> None:
    """In a container the path is the host's, of which only the own group is mounted."""
    groups = "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    proc = fake_proc(tmp_path, mounts={"cgroup": "/docker/abc", "cgroup2": "/"}, groups=groups, available_kib=9000)
    group(tmp_path / "cgroup", str(2**63 - 4096), 5000)
    assert available_memory(proc) == (9000 * 1024, "this machine", 0)
    group(tmp_path / "cgroup", "7000", 5000, total_active_file=100, total_inactive_file=200, active_file=50)
    assert available_memory(proc) == (7000 - (5000 - 300), "this control group", 0)


@pytest.mark.parametrize(
    ("limit", "used", "swap"),
    [("max", 0, 3000 * 1024), ("5000", 4000, 1000), ("0", 0, 0), (None, 0, 0)],
)
def test_swap_of_a_control_group(tmp_path: Path, limit: str | None, used: int, swap: int) -> None:
    proc = fake_proc(tmp_path, mounts={"cgroup2": "/"}, groups="0::/box\n", available_kib=9000, swap_kib=3000)
    assert available_memory(proc) == (9000 * 1024, "this machine", 3000 * 1024)
    group(tmp_path / "cgroup2/box", "8000", 6000)
    if limit is not None:
        (tmp_path / "cgroup2/box/memory.swap.max").write_text(f"{limit}\n")
        (tmp_path / "cgroup2/box/memory.swap.current").write_text(f"{used}\n")
    assert available_memory(proc) == (2000, "this control group", swap)


def test_memory_that_is_not_reported_limits_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
