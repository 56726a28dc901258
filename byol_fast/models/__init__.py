"""Self-supervised models, their encoders and layers."""

from byol_fast.models.base import SelfSupervisedTask, TaskOutput
from byol_fast.models.builder import make_task
from byol_fast.models.byol import BYOL
from byol_fast.models.encoders import build_encoder, encoder_names, feature_dim
from byol_fast.models.simsiam import SimSiam

__all__ = [
    "BYOL",
    "SelfSupervisedTask",
    "SimSiam",
    "TaskOutput",
    "build_encoder",
    "encoder_names",
    "feature_dim",
    "make_task",
]
