"""The training step of byol_fast on a fixed batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byol_fast.bench.problem import AUTOCAST_DTYPES, LR, MOMENTUM, TAU, Problem, copy_parameters
from byol_fast.config import OptimConfig
from byol_fast.data import Batch
from byol_fast.models.byol import BYOL
from byol_fast.models.gpu_tuning import tune_for_gpu
from byol_fast.optim.optimizers import build_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.mode import Mode, compile_forward
from byol_fast.training.train_step import TrainStep
from byol_fast.utils.cpu_tuning import keep_freed_memory, use_small_map_convolutions
from byol_fast.utils.precision import Precision


class ByolFastStep:
    """`TrainStep` as the trainer runs it, except for the process-wide flags of torch's backends.

    Args:
        problem: networks, batch and device.
        dtype: of the weights.
        optimizer: "lars", or "sgd" to compare weights with the baseline's.
        precision: "fp32", "tf32", "bf16" or "fp16".
        mode: "eager", "compile" or "graph".
        batched: both views in one pass, with statistics for each.
        small_maps: `use_small_map_convolutions`, on a CPU.
        memory: `keep_freed_memory`, on a CPU, for the whole process.
        channels_last: NHWC memory.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "lars",
        precision: str = "fp32",
        mode: str = "eager",
        batched: bool = True,
        small_maps: bool = True,
        memory: bool = True,
        channels_last: bool = True,
    ) -> None:
        device = torch.device(problem.device)
        self.model = _build_model(problem, "batched" if batched else "separate").to(device, dtype)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if device.type == "cuda" and channels_last:
            tune_for_gpu(self.model)
        if device.type == "cpu" and small_maps and mode == "eager":
            use_small_map_convolutions(self.model)
        if device.type == "cpu" and memory:
            keep_freed_memory()
        config = OptimConfig(name=optimizer, momentum=MOMENTUM, weight_decay=0.0 if optimizer == "sgd" else 1e-6)  # type: ignore[arg-type]
        self.step = TrainStep(
            self.model,
            build_optimizer(config, self.model.trainable_parameters()),
            RunSchedule(total_steps=10**6, base_lr=LR, lr_schedule="constant", tau_base=TAU, tau_schedule="constant"),
            precision=Precision(precision, AUTOCAST_DTYPES[precision]),  # type: ignore[arg-type]
            forward=compile_forward(self.model, Mode(mode, "requested")),  # type: ignore[arg-type]
            channels_last=channels_last,
        )
        if mode == "graph":
            self.step.use_cuda_graph()
        layout = torch.channels_last if channels_last else torch.contiguous_format  # the loader's layout
        view1, view2 = (v.to(dtype).contiguous(memory_format=layout) for v in problem.make_views())
        self.batch = Batch((view1, view2), None, torch.arange(problem.batch_size))

    def __call__(self) -> Tensor:
        """Take one training step and return its loss."""
        return self.step(self.batch, 0).loss


def _build_model(problem: Problem, view_batching: str) -> BYOL:
    """BYOL with the initial weights of all candidates."""
    encoder, projector, predictor = problem.build_networks()
    model = BYOL(
        encoder,
        hidden_dim=problem.hidden_dim,
        projection_dim=problem.projection_dim,
        last_bias=True,
        image_size=problem.image_size,
        view_batching=view_batching,  # type: ignore[arg-type]
    )
    for network, heads in ((model.online, (projector, predictor)), (model.target, (projector,))):
        for head, source in zip((network.projector, getattr(network, "predictor", None)), heads, strict=False):
            assert isinstance(head, nn.Module)
            copy_parameters(head, source)
    return model
