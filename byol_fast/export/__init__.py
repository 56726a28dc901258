"""Trained encoders as files."""

from byol_fast.export.encoder import export_encoder, export_run, load_encoder, load_latest_encoder

__all__ = ["export_encoder", "export_run", "load_encoder", "load_latest_encoder"]
