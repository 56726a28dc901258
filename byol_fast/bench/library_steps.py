"""Training steps of other libraries, assembled as their documentation does."""

from __future__ import annotations

import torch
from torch import Tensor

from byol_fast.bench.problem import AUTOCAST_DTYPES, LR, MOMENTUM, TAU, Problem, copy_parameters


class LightlyStep:
    """lightly's building blocks, assembled as in its example `byol.py`, with its LARS.

    Args:
        problem: networks, batch and device.
        precision: "fp32", or the precision of autocast.
    """

    def __init__(self, problem: Problem, *, precision: str = "fp32") -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.utils.lars import LARS

        encoder, projector, predictor = problem.build_networks()
        hidden, out = problem.hidden_dim, problem.projection_dim
        self.backbone, self.projector = encoder, BYOLProjectionHead(problem.feature_dim, hidden, out)
        self.predictor = BYOLPredictionHead(out, hidden, out)
        # The first layer has no bias, which the batch norm behind it would cancel.
        copy_parameters(self.projector, projector, skip="0.bias")
        copy_parameters(self.predictor, predictor, skip="0.bias")
        self.momentum_backbone = problem.build_encoder()
        self.momentum_projector = BYOLProjectionHead(problem.feature_dim, hidden, out)
        copy_parameters(self.momentum_backbone, encoder)
        copy_parameters(self.momentum_projector, projector, skip="0.bias")
        for network in (self.momentum_backbone, self.momentum_projector):
            deactivate_requires_grad(network)
        for network in (self.backbone, self.projector, self.predictor, self.momentum_backbone, self.momentum_projector):
            network.to(problem.device)
        parameters = [p for m in (self.backbone, self.projector, self.predictor) for p in m.parameters()]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6)
        self.criterion, self.update_momentum = NegativeCosineSimilarity(), update_momentum
        self.views = problem.make_views()
        self.device_type, self.autocast_dtype = torch.device(problem.device).type, AUTOCAST_DTYPES[precision]

    def __call__(self) -> Tensor:
        """Take one training step and return its loss."""
        self.update_momentum(self.backbone, self.momentum_backbone, TAU)
        self.update_momentum(self.projector, self.momentum_projector, TAU)
        view1, view2 = self.views
        with torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            p1, p2 = (self.predictor(self.projector(self.backbone(v).flatten(start_dim=1))) for v in (view1, view2))
            z1, z2 = (self.momentum_projector(self.momentum_backbone(v).flatten(start_dim=1)) for v in (view1, view2))
            loss: Tensor = 0.5 * (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class BYOLPyTorchStep:
    """byol-pytorch's learner as in its README; the given views replace its augmentations."""

    def __init__(self, problem: Problem) -> None:
        from byol_pytorch import BYOL as Learner  # noqa: N811

        encoder, projector, predictor = problem.build_networks()
        self.views = list(problem.make_views())
        self.learner = Learner(
            encoder.to(problem.device),
            image_size=problem.image_size,
            hidden_layer=-1,
            projection_size=problem.projection_dim,
            projection_hidden_size=problem.hidden_dim,
            augment_fn=lambda _: self.views[0],
            augment_fn2=lambda _: self.views[1],
            moving_average_decay=TAU,
            use_simplicial_embeddings=False,
        )
        copy_parameters(self.learner.online_encoder.projector, projector)
        copy_parameters(self.learner.target_encoder.projector, projector)
        copy_parameters(self.learner.online_predictor, predictor)
        self.learner.to(problem.device)
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    def __call__(self) -> Tensor:
        """Take one training step and return its loss."""
        loss: Tensor = self.learner(self.views[0])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.learner.update_moving_average()
        return loss.detach()


class StablePretrainingStep:
    """stable-pretraining's BYOL module in a plain loop, with its LARS and the EMA update of its callback."""

    def __init__(self, problem: Problem) -> None:
        import loguru

        loguru.logger.disable("stable_pretraining")  # warnings about Lightning, which a plain loop does not use
        from stable_pretraining.methods.byol import BYOL as Module  # noqa: N811
        from stable_pretraining.optim import LARS

        encoder, projector, predictor = problem.build_networks()
        heads = (problem.hidden_dim, problem.projection_dim)
        self.module = Module(encoder, heads, heads, ema_decay_start=TAU, ema_decay_end=TAU)
        copy_parameters(self.module.projector.student, projector)
        copy_parameters(self.module.projector.teacher, projector)
        copy_parameters(self.module.predictor, predictor)
        self.module.to(problem.device)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=1e-6, exclude_bias_n_norm=True)
        self.views = problem.make_views()

    def __call__(self) -> Tensor:
        """Take one training step and return its loss."""
        loss: Tensor = self.module(*self.views).loss
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.module.backbone.update_teacher()
        self.module.projector.update_teacher()
        return loss.detach()
