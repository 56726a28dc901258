"""What the representation is worth."""

from byol_fast.evaluate.embed import calibrated, embed
from byol_fast.evaluate.knn import KNNResult, knn_accuracy, knn_predict

__all__ = ["KNNResult", "calibrated", "embed", "knn_accuracy", "knn_predict"]
