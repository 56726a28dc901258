"""The roofline: FLOPs compared with torch's counter, bytes with counts by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from byol_fast import config as configs
from byol_fast.cli.main import main
from byol_fast.config import recipes
from byol_fast.models.byol import BYOL
from byol_fast.profiling import Ceilings, Roofline, estimate_memory, measure, mfu, roofline, stated
from byol_fast.profiling.layers import trace
from byol_fast.profiling.page import roofline_chart
from byol_fast.profiling.traffic import LEVELS, Kernel, Level, Traffic
from byol_fast.utils.precision import Precision


def kernels(network: nn.Module, level: Level, *, batch: int = 4, size: int = 8) -> list[Kernel]:
    network = network.to("meta")
    graph = trace(network, [torch.empty(batch, 3, size, size, device="meta")])
    return Traffic(graph, width=2, phase="online forward", backward=True).kernels(level)


def total_bytes(network: nn.Module, level: Level) -> int:
    return sum(k.bytes for k in kernels(network, level))


# ------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize(
    ("encoder", "sizes", "cifar_stem"),
    [
        ("resnet50", (64, 64), False),
        ("resnet18", (32, 32), True),
        ("vgg16", (64, 64), False),
        ("resnet18_lightly", (32, 32), True),
        ("resnet18", (32, 40, 24, 24, 24), True),
        ("resnet18", (32, 32, 32), True),
    ],
)
def test_flops_equal_torch_flop_counter(encoder: str, sizes: tuple[int, ...], cifar_stem: bool) -> None:
    with torch.device("meta"):
        model = BYOL(encoder, image_size=sizes[0], cifar_stem=cifar_stem, view_batching="separate").train()
        views = [torch.empty(4, 3, size, size) for size in sizes]
    with FlopCounterMode(display=False) as forward:
        loss = model.forward_train(*views).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    changes = {"model.encoder": encoder, "model.cifar_stem": cifar_stem, "model.zero_init_residual": False}
    changes |= {"view1.size": sizes[0], "view2.size": sizes[1], "num_local_views": len(sizes) - 2}
    if len(sizes) > 2:
        changes["local_view.size"] = sizes[2]
    result = roofline(configs.replace(recipes.imagenet_resnet50(), changes), batch_size=4)
    assert result.view_sizes == sizes
    for level in LEVELS:
        passes = [result.total(level, phase=p).flops for p in ("online forward", "target forward")]
        assert sum(passes) == forward.get_total_flops()
        assert result.total(level, phase="backward").flops == backward.get_total_flops()


def test_attention_flops_are_those_of_two_products() -> None:
    # 4 images, 2 heads, 17 tokens, 8 numbers each: Q K^T and its product with V, a multiply-add is two operations.
    q = torch.empty(4, 2, 17, 8, device="meta", requires_grad=True)

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    forward, backward = Traffic(trace(Attention(), [q]), width=2, phase="f", backward=True).kernels("A")[:2]
    assert forward.flops == 2 * (2 * 4 * 2 * 17 * 17 * 8)
    assert backward.flops == 2.5 * forward.flops
    tensor = 4 * 2 * 17 * 8 * 2
    assert forward.bytes == 4 * tensor  # q, k, v in, the output out
    assert backward.bytes == 8 * tensor  # the same and the output's gradient in, three gradients out


# ------------------------------------------------------------------ bytes, counted by hand

# Two layers, bf16: 4 images [3, 8, 8] -> conv 3x3, 8 channels -> BN -> ReLU -> conv 3x3, stride 2, 16 channels -> BN.
X = 4 * 3 * 8 * 8 * 2  # bytes of the images
Y1 = 4 * 8 * 8 * 8 * 2  # of the first convolution's output
Y2 = 4 * 16 * 4 * 4 * 2  # of the second one's
W1 = 8 * 3 * 3 * 3 * 2  # of the weights
W2 = 16 * 8 * 3 * 3 * 2
CONVOLUTIONS = (X + W1 + Y1) + (Y1 + W2 + Y2)

TWO_LAYERS = {
    # BN: 2 reads, 1 write; ReLU: 1 + 1
    "A": CONVOLUTIONS + 3 * Y1 + 2 * Y1 + 3 * Y2
    # backward: BN g, x, then g, x and the result; dgrad g, W, result; wgrad g, x, an fp32 result (2 W)
    + 5 * Y2 + (Y2 + W2 + Y1) + (Y2 + Y1 + 2 * W2)
    # ReLU g, y, result; BN; wgrad: images need no gradient
    + 3 * Y1 + 5 * Y1 + (Y1 + X + 2 * W1),
    # statistics 1 read, BN and ReLU together 1 + 1
    "B": CONVOLUTIONS + Y1 + 2 * Y1 + Y2 + 2 * Y2
    + 5 * Y2 + (Y2 + W2 + Y1) + (Y2 + Y1 + 2 * W2)
    # BN with ReLU: sums g, y, x; then g, y, x and the result
    + 7 * Y1 + (Y1 + X + 2 * W1),
    # the first BN happens while the second convolution reads, the second BN writes the network's output
    "D": CONVOLUTIONS + 2 * Y2
    # both gradients read g and the raw output (for BN's backward); dgrad reads x once more for the ReLU and BN before
    + (Y2 + Y2 + W2 + Y1 + Y1) + (Y2 + Y2 + Y1 + 2 * W2)
    + (Y1 + Y1 + X + 2 * W1),
    # dgrad and wgrad in one: g, raw output, x, W; two results
    "E": CONVOLUTIONS + 2 * Y2
    + (Y2 + Y2 + Y1 + W2 + Y1 + 2 * W2)
    + (Y1 + Y1 + X + 2 * W1),
}  # fmt: skip


def two_layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),  # a bias is a vector: not counted
        nn.BatchNorm2d(16),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_bytes_of_two_layers_equal_counts_by_hand(level: Level) -> None:
    assert total_bytes(two_layers(), level) == TWO_LAYERS[level]


class Residual(nn.Module):
    """A convolution, then relu(bn(conv(x)) + x) and the mean over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.bn(self.second(x))
        out += x
        return torch.relu(out).mean((2, 3))


# All maps have the size Y1; the mean is M.
M, W3 = 4 * 8 * 2, 8 * 8 * 9 * 2
RESIDUAL_FORWARD = (X + W1 + Y1) + (Y1 + W3 + Y1) + (Y1 + M)
RESIDUAL = {
    # BN 3, sum 3, ReLU 2; backward: mean, ReLU 3, BN 5, dgrad, wgrad, the two gradients of x added 3, wgrad
    "A": RESIDUAL_FORWARD + 8 * Y1
    + (M + Y1) + 3 * Y1 + 5 * Y1 + (Y1 + W3 + Y1) + (Y1 + Y1 + 2 * W3) + 3 * Y1 + (Y1 + X + 2 * W1),
    # statistics 1, then raw output and x in, y out; backward: sums read the mean's gradient, y, raw, and write the
    # masked gradient, which is x's too; BN reads it and raw and writes. x's two gradients meet at a convolution,
    # which reads one tensor: inductor adds them, 2 + 1
    "B": RESIDUAL_FORWARD + Y1 + 3 * Y1
    + (M + 3 * Y1) + 3 * Y1 + (Y1 + W3 + Y1) + (Y1 + Y1 + 2 * W3) + 3 * Y1 + (Y1 + X + 2 * W1),
    # while the mean reads raw: x in, y out; backward: g and raw twice, dgrad reads x again, and x's other gradient
    "D": RESIDUAL_FORWARD + 2 * Y1
    + (Y1 + Y1 + W3 + Y1 + Y1) + (Y1 + Y1 + Y1 + 2 * W3) + Y1 + (Y1 + X + 2 * W1),
    "E": RESIDUAL_FORWARD + 2 * Y1
    + (Y1 + Y1 + Y1 + W3 + Y1 + 2 * W3) + Y1 + (Y1 + X + 2 * W1),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_bytes_of_a_residual_block_equal_counts_by_hand(level: Level) -> None:
    assert total_bytes(Residual(), level) == RESIDUAL[level]


def test_resnet50_equals_published_counts() -> None:
    result = roofline("resnet50", batch_size=256, image_size=224)
    assert result.total("A").flops / 1e12 == pytest.approx(16.67, abs=0.005)
    # The earlier count left out the heads' norms, and at A added gradients of the last block's output, which has one.
    for level, gigabytes, tolerance in (("A", 341, 1.0), ("B", 250, 0.5), ("D", 155, 0.5), ("E", 122, 0.5)):
        assert result.total(level).bytes / 1e9 == pytest.approx(gigabytes, abs=tolerance)  # type: ignore[arg-type]
    for gpu, level, images in (("H100", "A", 2143), ("H100", "B", 2878), ("H100", "E", 5500), ("H200", "D", 6048)):
        assert result.images_per_second(stated(gpu), level) == pytest.approx(images, rel=0.002)  # type: ignore[arg-type]


# ------------------------------------------------------------------ other networks


class Unmodeled(nn.Module):
    """A network with an operation that has no model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.conv(x), dim=1).mean((2, 3))


def test_what_is_not_modelled_is_counted_and_named() -> None:
    result = roofline(Unmodeled(), batch_size=4, image_size=8)
    assert result.unmodeled == ("cumsum",)
    size = 8 * 8 * 6 * 6 * 2  # of the map, bytes: 8 views
    for level in LEVELS:
        assert result.total(level, phase="target forward", family="unmodeled").bytes == 2 * size
        assert result.total(level, phase="backward", family="unmodeled").bytes == 3 * size


def test_network_that_depends_on_values_raises() -> None:
    class Branches(Unmodeled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() > 0) else -x)

    with pytest.raises(ValueError, match="meta tensors"):
        roofline(Branches(), batch_size=4, image_size=8)


@pytest.mark.parametrize("encoder", ["vit_b_16", "convnext_tiny", "efficientnet_b0", "swin_t"])
def test_traffic_decreases_with_the_level_of_fusion(encoder: str) -> None:
    result = roofline(encoder, batch_size=2, image_size=64)
    assert result.unmodeled == ()
    by_level = [result.total(level).bytes for level in LEVELS]
    assert by_level == sorted(by_level, reverse=True)
    assert len({result.total(level).flops for level in LEVELS}) == 1


def test_step_counts_optimizer_and_accumulated_batches() -> None:
    config = recipes.demo()
    once = roofline(config, dtype="fp32")
    twice = roofline(configs.replace(config, {"grad_accum_steps": 2}), dtype="fp32")
    update = once.total("E", phase="optimizer + EMA").bytes
    # SGD reads and writes p and v and reads g; the target is read and written.
    assert update == 20 * once.num_trainable + 8 * once.num_target
    assert twice.total("B").bytes - update_of(twice) == 2 * (once.total("B").bytes - update_of(once))
    assert twice.batch_size == 2 * once.batch_size
    assert roofline(recipes.get("simsiam_cifar10"), batch_size=2).total("A", phase="target forward").bytes == 0


@pytest.mark.parametrize("num_local", [0, 1, 6])
def test_fused_loss_reads_and_writes_each_tensor_once(num_local: int) -> None:
    config = configs.replace(recipes.demo(), {"num_local_views": num_local, "local_view.size": 12})
    result = roofline(config, batch_size=5, dtype="fp32")
    matrix = 5 * config.model.projection_dim * 4
    # Read: predictions of all views, projections of the global ones; written: gradients of the predictions.
    assert result.total("E", phase="loss").bytes == ((2 + num_local) + 2 + (2 + num_local)) * matrix
    eager, fused = (result.total(level, phase="loss").bytes for level in ("A", "B"))
    assert eager > fused > result.total("E", phase="loss").bytes


def update_of(result: Roofline) -> int:
    return result.total("B", phase="optimizer + EMA").bytes


# ------------------------------------------------------------------ floors


def test_floor_is_the_larger_of_both_ceilings() -> None:
    result = roofline(two_layers(), batch_size=4, image_size=8)
    slow_memory = Ceilings(
        name="", dtype="bf16", bytes_per_s=1.0, flops_per_s=1e30, peak_flops_per_s=1e30, source="test"
    )
    slow_products = Ceilings(
        name="", dtype="bf16", bytes_per_s=1e30, flops_per_s=1.0, peak_flops_per_s=1.0, source="test"
    )
    for schedule in ("sum", "overlap"):
        assert result.floor(slow_memory, "A", schedule=schedule) == pytest.approx(result.total("A").bytes)
        assert result.floor(slow_products, "A", schedule=schedule) == pytest.approx(result.total("A").flops)
    mixed = Ceilings(
        name="", dtype="bf16", bytes_per_s=1.0, flops_per_s=10.0, peak_flops_per_s=10.0, source="test"
    )  # the convolutions are bound by products, the rest by memory
    assert result.floor(mixed, "A") > result.floor(mixed, "A", schedule="overlap")
    assert result.images_per_second(mixed, "A") == 4 / result.floor(mixed, "A")


def test_traffic_within_caches_is_moved_at_their_speed() -> None:
    """The parameters of a small network lie in a cache: an optimizer's step on them is no copy through memory."""
    speeds = {"bytes_per_s": 10.0, "flops_per_s": 1e30, "peak_flops_per_s": 1e30}
    ceilings = Ceilings(name="", dtype="fp32", source="test", cache_bytes=100, cache_bytes_per_s=50.0, **speeds)
    # Up to 100 bytes are in the cache at the beginning, and up to 100 at the end.
    assert [ceilings.seconds(0, n) for n in (50, 200, 400)] == [1.0, 4.0, 20.0]
    assert dataclasses.replace(ceilings, flops_per_s=1.0).seconds(7, 50) == 7.0
    result = roofline(two_layers(), batch_size=4, image_size=8)
    large = dataclasses.replace(ceilings, cache_bytes=1 << 40)
    for schedule in ("sum", "overlap"):
        assert result.floor(large, "A", schedule=schedule) == pytest.approx(result.total("A").bytes / 50.0)
    assert roofline_chart({}, dataclasses.asdict(ceilings), title="t").count("<path") > roofline_chart(
        {}, dataclasses.asdict(dataclasses.replace(ceilings, cache_bytes=0)), title="t"
    ).count("<path")


def test_mfu_of_known_values() -> None:
    assert mfu(1e12, 0.01, 400e12) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="must be positive"):
        mfu(1e12, 0.0, 1e12)


def test_measured_ceilings_are_plausible() -> None:
    result = measure(torch.device("cpu"), "fp32", seconds=0.01)
    assert 1e8 < result.bytes_per_s < 1e13
    assert 1e8 < result.flops_per_s < 1e15
    assert result.source == "measured"
    with pytest.raises(ValueError, match="gpu must be one of A100"):
        stated("H900")


def test_command_writes_json_and_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, plot = tmp_path / "roofline.json", tmp_path / "roofline.svg"
    with pytest.raises(SystemExit) as end:
        main(["roofline", "demo", "--gpu", "H100", "--batch-size", "32", "--output", str(to), "--plot", str(plot)])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "H100" in shown
    config = configs.replace(recipes.demo(), {"batch_size": 32})
    assert f"memory: {estimate_memory(config, 'cuda', Precision('bf16', torch.bfloat16))}" in shown
    record = json.loads(to.read_text())
    assert record["batch_size"] == 32
    assert sum(row["bytes"].get("B", 0) for row in record["rows"]) == record["levels"]["B"]["bytes"]
    assert plot.read_text().startswith("<svg")
