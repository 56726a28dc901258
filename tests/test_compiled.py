"""What torch.compile makes of the training pass: the same gradients. Without inductor, so that it takes seconds.

Runs on the oldest supported torch, too, whose tracer has other faults than the newest's.
"""

from __future__ import annotations

import pytest
import torch

from byol_fast.methods import BYOL, SelfSupervisedTask, SimSiam


@pytest.mark.parametrize("method", [BYOL, SimSiam])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_a_compiled_pass_are_the_eager_ones(method: type[SelfSupervisedTask], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    )
    task = method(encoder, hidden_dim=16, projection_dim=8, image_size=16).to(dtype)
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=dtype)
    start = {name: t.clone() for name, t in task.state_dict().items()}
    found = {}
    for name, forward in (
        ("eager", task.training_output),
        ("compiled", torch.compile(task.training_output, dynamic=False, backend="aot_eager")),
    ):
        task.load_state_dict(start)
        task.zero_grad(set_to_none=True)
        output = forward(view1, view2)
        output.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        assert output.features is not None
        found[name] = [output.loss.detach(), output.collapse_std, output.features, *gradients, *task.buffers()]
        found[name] = [t.detach().clone() for t in found[name]]
    assert len(found["eager"]) == len(found["compiled"]) > 20
    size = torch.cat([t.flatten().double() for t in found["eager"]]).norm()
    for a, b in zip(found["compiled"], found["eager"], strict=True):
        # Sums of some hundred terms in another order, and through a norm whose variance they decide; biases in front of
        # a norm have no gradient but rounding, so it is all of it that counts. A lost gradient is a third of it.
        assert (a.double() - b.double()).norm() <= (1e-12 if dtype == torch.float64 else 1e-4) * size
