"""Self-supervised models, their encoders and layers."""

from byol_fast.models.base import ModelOutput, SSLModel
from byol_fast.models.builder import build_model
from byol_fast.models.byol import BYOL
from byol_fast.models.encoders import build_encoder, encoder_names, feature_dim
from byol_fast.models.simsiam import SimSiam
from byol_fast.models.split_batchnorm import (
    convert_split_batchnorm,
    convert_sync_batchnorm,
    revert_split_batchnorm,
)

__all__ = [
    "BYOL",
    "ModelOutput",
    "SSLModel",
    "SimSiam",
    "build_encoder",
    "build_model",
    "convert_split_batchnorm",
    "convert_sync_batchnorm",
    "encoder_names",
    "feature_dim",
    "revert_split_batchnorm",
]
