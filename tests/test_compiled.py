"""The training pass under torch.compile has the same gradients. Without inductor, so that it takes seconds.

Runs on the oldest supported torch, too, whose tracer has other faults than the newest's.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torchvision.models.resnet import Bottleneck

from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.base import SSLModel
from byol_fast.models.byol import BYOL
from byol_fast.models.gpu_tuning import tune_for_gpu
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.train_step import TrainStep
from tests.networks import METHODS, SmallResidualNetwork


@pytest.mark.parametrize(
    ("method", "dtype", "num_local"),
    [*itertools.product(METHODS, [torch.float64, torch.float32], [0]), (BYOL, torch.float64, 2)],
    ids=str,
)
def test_gradients_of_a_compiled_pass_are_the_eager_ones(
    method: type[SSLModel], dtype: torch.dtype, num_local: int
) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    )
    model = method(encoder, hidden_dim=16, projection_dim=8, image_size=16).to(dtype)
    views = [*torch.randn(2, 6, 3, 16, 16, dtype=dtype), *torch.randn(num_local, 6, 3, 8, 8, dtype=dtype)]
    start = {name: t.clone() for name, t in model.state_dict().items()}
    found = {}
    for name, forward in (
        ("eager", model.forward_train),
        ("compiled", torch.compile(model.forward_train, dynamic=False, fullgraph=True, backend="aot_eager")),
    ):
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        output = forward(*views)
        output.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[name] = [output.loss.detach(), output.embedding_std, output.features, *gradients, *model.buffers()]
        found[name] = [t.detach().clone() for t in found[name]]
    assert len(found["eager"]) == len(found["compiled"]) > 20
    size = torch.cat([t.flatten().double() for t in found["eager"]]).norm()
    for a, b in zip(found["compiled"], found["eager"], strict=True):
        # Sums of some hundred terms in another order, and through a norm whose variance they decide; biases in front of
        # a norm have no gradient but rounding, so it is all of it that counts. A lost gradient is a third of it.
        assert (a.double() - b.double()).norm() <= (1e-12 if dtype == torch.float64 else 1e-4) * size


def residual_model() -> tuple[BYOL, tuple[Tensor, ...]]:
    """BYOL of blocks as in ResNet-50, in NHWC memory, and views.

    The first shortcut has a convolution, ReLUs and sums change the outputs of norms in place, and in one block norms
    apply the ReLU.
    """
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
    blocks = [Bottleneck(8, 4, downsample=shortcut), Bottleneck(16, 4), Bottleneck(16, 4)]
    tune_for_gpu(blocks[1])
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), *blocks, torch.nn.AdaptiveAvgPool2d(1))
    model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=16).to(memory_format=torch.channels_last)
    return model, torch.rand(2, 4, 16, 16, 3).permute(0, 1, 4, 2, 3).unbind()


def test_a_compiled_backward_pass_copies_no_gradient_into_another_layout() -> None:
    """In the graph that inductor gets, every gradient of a convolution is NHWC if the network is."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, views = residual_model()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.compile(model.forward_train, dynamic=False, backend=backend)(*views)
    output.loss.backward()  # type: ignore[no-untyped-call]
    backward = graphs[-1].graph.nodes
    gradients = [node.args[0].meta["val"] for node in backward if "convolution_backward" in str(node.target)]
    assert len(gradients) == 11
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients)
    assert not [node for node in backward if "new_empty_strided" in str(node.target)]  # of a view changed in place
    # ReLUs with a gradient of their own: three of two blocks, the last of the tuned one, and one of each MLP.
    assert len([node for node in backward if "threshold_backward" in str(node.target)]) == 9


def test_compiled_code_stores_activations_and_gradients_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor's code for the same network, generated and not compiled."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(AsyncCompile, "wait", lambda *_: None)
    model, views = residual_model()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = torch.compile(model.forward_train, dynamic=False)(*views)
        output.loss.backward()  # type: ignore[no-untyped-call]

    with torch._inductor.config.patch(fx_graph_cache=False):
        _, sources = run_and_get_code(step)
    assert len(sources) == 2  # forward and backward
    allocated = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", "".join(sources))
    sizes = [(math.prod(map(int, re.findall(r"\d+", shape))), dtype) for shape, dtype in allocated]
    activation = 2 * 4 * 16 * 14 * 14
    assert len([size for size, dtype in sizes if size == activation and dtype == "bfloat16"]) > 0
    # Statistics are fp32, and small.
    assert not [size for size, dtype in sizes if size >= activation // 4 and dtype == "float32"]


@pytest.mark.parametrize("num_local", [0, 2])
def test_training_pass_is_compiled_once(num_local: int) -> None:
    """A second variant would cost a run its compile time again, in its second step."""
    torch.manual_seed(0)
    model = BYOL(SmallResidualNetwork(), hidden_dim=16, projection_dim=8, image_size=16)
    step = TrainStep(
        model,
        build_optimizer(OptimConfig(), model.trainable_parameters()),
        RunSchedule(total_steps=3, warmup_steps=1, base_lr=0.2, batch_size=8, tau_base=0.9),
        forward=torch.compile(model.forward_train, dynamic=False, backend="aot_eager"),
    )
    sizes = [16, 16, *[12] * num_local]
    views = tuple(torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8) for size in sizes)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(3):
            assert step(Batch(views, None, torch.arange(8)), k).skipped == 0
