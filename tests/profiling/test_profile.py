"""Profiles of real runs: each planted fault has a finding, and a run without faults has none of them."""

from __future__ import annotations

import html
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byol_fast import Callback
from byol_fast import config as configs
from byol_fast.cli.main import main
from byol_fast.config import Config, ConfigError
from byol_fast.models import encoders
from byol_fast.profiling import Ceilings, profile
from byol_fast.profiling.kernels import family_of
from byol_fast.profiling.page import run_sections, sections
from byol_fast.profiling.trace import find_gaps
from byol_fast.report.build import report
from byol_fast.utils import env

FAULTS = {"slow data", "one thread", "tiny batch", "precision", "host sync"}
CEILINGS = Ceilings(
    name="this machine", dtype="fp32", bytes_per_s=1e10, flops_per_s=1e11, peak_flops_per_s=1e11, source="assumed"
)
CORES = env.num_cpus()


@pytest.fixture
def run(tiny: Config) -> Config:
    """A run on small images, in the machine's default precision."""
    changes = {"view1.size": 32, "view2.size": 32, "view1.blur_p": 0.0, "view2.blur_p": 0.0, "steps": 1000}
    return configs.replace(tiny, changes | {"precision": "auto", "batch_size": 48, "model.cifar_stem": False})


@pytest.fixture
def one_core() -> Iterator[None]:
    """Restrict the process to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def profiled(config: Config, steps: int = 2, **options: Any) -> dict[str, Any]:
    record, _ = profile(config, steps=steps, ceilings=CEILINGS, **options)
    return record


def kinds(record: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in record["findings"]}


def finding(record: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(f for f in record["findings"] if f["kind"] == kind)


# ------------------------------------------------------------------ findings


def test_run_without_faults_has_none_of_their_findings(run: Config, one_core: None) -> None:
    record = profiled(run, steps=4)
    assert not kinds(record) & FAULTS, record["findings"]
    assert record["machine"]["cores"] == record["machine"]["torch_threads"] == 1


class SlowImages:
    """Images whose loading takes 0.03 s."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        time.sleep(0.03)
        item: np.ndarray = self.images[index]
        return item


def test_slow_data_is_found(run: Config, photos: np.ndarray) -> None:
    changes = {"data.root": None, "data.threads": 1, "data.prefetch": 1, "batch_size": 8}
    record = profiled(configs.replace(run, changes), data=SlowImages(photos))
    named = finding(record, "slow data")
    assert record["step"]["data_wait"] > 0.3
    assert named["share"] == record["step"]["data_wait"]
    if CORES > 1:
        assert "raise data.threads (now 1" in named["change"]


@pytest.mark.skipif(CORES < 2 and not env.cpu_has_bf16(), reason="one core, and bf16 is not fast on this CPU")
def test_one_thread_and_fp32_are_found(run: Config) -> None:
    assert torch.get_num_threads() == 1  # set by conftest
    record = profiled(configs.replace(run, {"precision": "fp32", "batch_size": 6, "model.cifar_stem": True}))
    assert record["precision"] == "fp32"
    if CORES > 1:
        assert f"1 of {CORES} cores" in finding(record, "one thread")["text"]
    if env.cpu_has_bf16():
        assert "bf16 than in fp32" in finding(record, "precision")["text"]


def test_tiny_batch_is_found(run: Config, one_core: None) -> None:
    record = profiled(configs.replace(run, {"batch_size": 2, "model.hidden_dim": 512}))
    assert "raise batch_size to 4 or more" in finding(record, "tiny batch")["change"]


class SyncingEncoder(nn.Module):
    """An encoder that reads a value from the device in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network = encoders.build_encoder("resnet18_narrow")
        self.network.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)
        return features if features.mean().item() < 1e6 else features * 0


class SyncingCallback(Callback):
    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        float(metrics.loss)


def test_host_sync_is_found_with_its_place(run: Config, one_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.OWN_ENCODERS, "waits", lambda **_: SyncingEncoder())
    monkeypatch.setattr(encoders, "_remove_classifier", lambda *_: None)
    record = profiled(configs.replace(run, {"model.encoder": "waits", "batch_size": 8}), callbacks=[SyncingCallback()])
    places = {sync["place"]: sync["per_step"] for sync in record["probes"]["host_syncs"]}
    assert [place.partition(":")[0] for place in places] == [__file__] * 2
    by_function = {place.rpartition(" in ")[2]: n for place, n in places.items()}
    assert by_function == {"forward": 2, "on_step_end": 1}  # the online network and the target
    named = [f for f in record["findings"] if f["kind"] == "host sync"]
    assert len(named) == 2
    assert all(f["share"] > 0 for f in named)
    # Such a network cannot run on meta tensors; the rest of the profile is complete.
    assert record["roofline"] is None
    assert any("No roofline" in note for note in record["notes"])
    assert "Profile: roofline" not in {s.title for s in sections(record)}


# ------------------------------------------------------------------ what is written


def test_command_writes_a_page_and_no_checkpoint(
    run: Config, npz: Path, tmp_path: Path, one_core: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data.root", str(npz), "--view1.size", "32", "--view2.size", "32", "--batch-size", "8"]
    arguments += ["--model.encoder", "resnet18_narrow", "--model.hidden-dim", "32", "--model.projection-dim", "16"]
    arguments += ["--out", str(tmp_path / "out"), "--name", "one", "--data.threads", "1"]
    arguments += ["--num-local-views", "1", "--local-view.size", "24"]
    with pytest.raises(SystemExit) as end:
        main(["profile", "cifar10_resnet18", "--model.no-cifar-stem", "--steps", "2", *arguments])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "out" / "one"
    assert str(folder / "profile" / "profile.html") in shown
    assert [p.name for p in folder.iterdir()] == ["profile"]
    record = json.loads((folder / "profile" / "profile.json").read_text())
    assert record["step"]["steps"] == 2
    phases = {row["phase"]: row for row in record["phases"]}
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1.0)
    floors = [(row["floor_seconds"], row["seconds"]) for row in phases.values() if row["floor_seconds"] is not None]
    assert len(floors) == 5
    assert all(floor <= seconds for floor, seconds in floors)
    assert record["roofline"]["floor_seconds"]["A"] <= record["step"]["seconds"]
    assert phases["backward"]["seconds"] > phases["loss"]["seconds"] > 0
    assert {"data wait", "views", "online forward", "target forward", "optimizer + EMA"} < set(phases)
    families = {row["family"]: row["calls"] for row in record["families"]}
    # Each view has its own statistics in the 20 batch norms of the online encoder, and its own backward pass. The
    # target takes the two global views.
    assert families["batch norm"] >= 3 * 20 + 2 * 20 + 3 * 20
    assert families["conv backward"] > 0
    estimated = record["memory"]
    assert estimated["total"] == sum(size for part, size in estimated.items() if part != "total")
    page = html.unescape((folder / "profile" / "profile.html").read_text())
    assert f"{estimated['total'] / 2**30:.3g} GiB" in page
    for section in sections(record):
        assert section.title in page
    assert all(f["text"] in page for f in record["findings"])
    assert "Only on a GPU:" in page
    assert (folder / "profile" / "trace.json.gz").stat().st_size > 1000


def test_profile_of_a_checkpoint_leaves_the_run_unchanged(run: Config, one_core: None) -> None:
    from byol_fast import Trainer

    short = configs.replace(run, {"steps": 2, "batch_size": 8, "knn.enabled": "off", "log": ()})
    folder = Trainer(short).fit().run_dir
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    slow = replace(CEILINGS, bytes_per_s=1.0)  # far too low, as beside other processes: all floors are too high
    record, written = profile(configs.load(folder / "config.json"), resume=folder, steps=1, ceilings=slow)
    assert written == folder / "profile"
    assert record["step"]["images_per_second"] > 0
    assert {p: p.read_bytes() for p in before} == before

    phases = [row for row in record["phases"] if row["floor_seconds"] is not None]
    assert len(phases) == 5
    assert all(row["floor_seconds"] == row["seconds"] and row["above_ceilings"] > 1 for row in phases)
    assert record["roofline"]["floor_seconds"]["E"] == record["step"]["seconds"]
    assert any("Faster than the measured ceilings allow" in note and "backward" in note for note in record["notes"])
    page = report([folder], pictures=False, extra_sections=run_sections).read_text()
    assert all(section.title in html.unescape(page) for section in sections(record))
    (written / "profile.json").write_text("{}")
    assert "could not be shown" in run_sections(folder)[0].html


def test_invalid_arguments_are_rejected(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["profile"], "a recipe, or --resume RUN"),
        (["profile", "demo", "--resume", "x"], "one of the two"),
        (["profile", "demo", "--steps", "many"], "--steps must be an integer, got 'many'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="steps must be an integer from 1 to 10,000, got 0"):
        profile(run, steps=0)


# ------------------------------------------------------------------ parts


def test_gaps_between_kernels() -> None:
    # In microseconds: two kernels that overlap, a gap of 20, a kernel, a gap of 5 below the threshold, a kernel.
    work = [("a", 0.0, 50.0), ("b", 30.0, 60.0), ("late", 80.0, 95.0), ("last", 100.0, 125.0)]
    idle, gaps = find_gaps(work[::-1])
    assert idle == pytest.approx(25 / 125)
    assert gaps == [{"milliseconds": 0.02, "before": "late"}]
    assert find_gaps([]) == (0.0, [])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "conv forward"),
        ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv dgrad"),
        ("cudnn::cnn::wgrad2d_grouped_direct_kernel", "conv wgrad"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("triton_red_fused__native_batch_norm_legit_functional_12", "batch norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<float>", "batch norm"),
        ("triton_poi_fused_add_relu_3", "pointwise"),
        ("triton_poi_fused__to_copy_add_clone_convolution_backward_div_sub_threshold_backward_view_59", "pointwise"),
        ("triton_poi_fused_add_max_pool2d_with_indices_max_pool2d_with_indices_backward_62", "pool"),
        ("triton_tem_fused__to_copy_convolution_7", "conv forward"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::threshold>", "pointwise"),
        ("_lars_apply_kernel", "optimizer + EMA"),
        ("void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>>", "optimizer + EMA"),
        ("_normalized_mse_fwd_kernel", "loss"),
        ("_photometric_kernel", "augmentation"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("flash_fwd_kernel", "attention"),
        ("void at::native::max_pool_forward_nhwc<float>", "pool"),
        ("something_new", "other"),
    ],
)
def test_family_of_kernel_names(name: str, family: str) -> None:
    assert family_of(name, on_gpu=True) == family
