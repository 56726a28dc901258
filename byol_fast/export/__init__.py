"""Encoders as files."""

from byol_fast.export.encoder import export_encoder, export_run, load_encoder, newest_encoder

__all__ = ["export_encoder", "export_run", "load_encoder", "newest_encoder"]
