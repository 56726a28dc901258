"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, and the protocol of one's own."""

from byol_fast.trackers.base import Metrics, RunInfo, Status, Tracker
from byol_fast.trackers.builtin import build_trackers, check_installed

__all__ = ["Metrics", "RunInfo", "Status", "Tracker", "build_trackers", "check_installed"]
