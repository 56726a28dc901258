"""Trained encoders as files."""

from byol_fast.export.encoder import export_encoder, export_run, load_encoder, load_latest_encoder
from byol_fast.export.transform import EvalTransform

__all__ = ["EvalTransform", "export_encoder", "export_run", "load_encoder", "load_latest_encoder"]
