"""Batch norm synchronized over processes, also compiled, and within a model with local views."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from byol_fast.models.byol import BYOL
from byol_fast.models.split_batchnorm import convert_split_batchnorm, convert_sync_batchnorm
from byol_fast.training.distributed import wrap_ddp
from tests.models.helpers import CLOSE, OwnForward, Residual, at_once, equal, everything, made, separately, with_norm

# Kind of the network, and images of a view on each of two processes.
CASES = (
    ("BatchNorm", [3, 3]),
    ("BatchNorm", [2, 4]),
    ("SyncBatchNorm", [3, 3]),
    ("SyncBatchNorm", [2, 4]),
    ("compiled", [3, 3]),
)


def network_and_images(kind: str) -> tuple[nn.Module, Tensor]:
    network = made(Residual)
    if kind == "SyncBatchNorm":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    return network.to(memory_format=torch.channels_last), torch.randn(2, 6, 3, 9, 7, dtype=torch.float64)


def model_and_views() -> tuple[BYOL, list[Tensor]]:
    torch.manual_seed(0)
    model = BYOL(Residual().double(), hidden_dim=8, projection_dim=5, image_size=12)
    return model, [torch.randn(6, 3, size, size, dtype=torch.float64) for size in (12, 12, 8, 8, 8)]


def trained(model: BYOL, views: list[Tensor]) -> dict[str, Tensor]:
    """Loss, gradients and running statistics of a pass."""
    loss = model.forward_train(*views).loss
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"loss": loss.detach()} | dict(model.named_buffers())
    return found | {f"d {name}": p.grad for name, p in model.online.named_parameters() if p.grad is not None}


def with_local_views(rank: int) -> dict[str, Tensor]:
    """`trained` on the images of one of two processes, in DDP."""
    model, views = model_and_views()
    for network in model.networks():
        convert_sync_batchnorm(network)
    model.wrap_online(lambda network: wrap_ddp(network, torch.device("cpu")))
    found = trained(model, [view.chunk(2)[rank] for view in views])
    distributed.all_reduce(found["loss"].div_(2))
    return found


def on_one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results: list[dict[str, Tensor]] = []
    for kind, shares in CASES:
        network, images = network_and_images(kind)
        assert convert_split_batchnorm(network) is None
        if kind != "SyncBatchNorm":
            convert_sync_batchnorm(network)
        if kind == "compiled":  # as a run with several processes does
            network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        x = torch.split(images, shares, dim=1)[rank].flatten(0, 1).clone().requires_grad_()
        y = at_once(network, x, 2)
        y.square().sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        found = {"y": y.detach(), "dx": x.grad} | dict(network.named_buffers())
        for name, p in network.named_parameters():
            assert p.grad is not None
            distributed.all_reduce(p.grad)
            found[f"d {name}"] = p.grad
        results.append(found)
    results.append(with_local_views(rank))
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_one_of_two, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    network, images = network_and_images("BatchNorm")
    x = images.flatten(0, 1).requires_grad_()
    y = separately(network, x, 2)
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    expected = trained(*model_and_views())
    for of_process in results:
        equal(of_process.pop(), expected)
    assert len(results[0]) == len(results[1]) == len(CASES)
    for case, (_, shares) in enumerate(CASES):
        for name, whole in (("y", y.detach()), ("dx", x.grad)):
            for rank, part in enumerate(torch.split(whole.view(2, 6, *whole.shape[1:]), shares, dim=1)):
                torch.testing.assert_close(results[rank][case][name], part.flatten(0, 1), **CLOSE)
        for name, p in network.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(results[0][case][f"d {name}"], p.grad, **CLOSE)
        for name, buffer in network.named_buffers():
            for rank in range(2):
                torch.testing.assert_close(results[rank][case][name], buffer, **CLOSE)


def test_layers_with_a_forward_of_their_own_cannot_be_synchronized() -> None:
    network = with_norm(OwnForward(4))
    with pytest.raises(ValueError, match=r"1 must be a batch norm of torch\.nn or timm, got OwnForward"):
        convert_sync_batchnorm(network)


def test_synchronized_alone_is_plain() -> None:
    network = made(Residual)
    alone = copy.deepcopy(network)
    convert_sync_batchnorm(alone)
    x = torch.randn(6, 3, 9, 7, dtype=torch.float64)
    equal(everything(alone, x, lambda n, x: n(x)), everything(network, x, lambda n, x: n(x)))
