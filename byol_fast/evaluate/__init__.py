"""What the representation is worth."""

from byol_fast.evaluate.embed import calibrated, embed
from byol_fast.evaluate.features import Features, embed_folder, load_features, save_features
from byol_fast.evaluate.knn import KNNResult, knn_accuracy, knn_predict
from byol_fast.evaluate.neighbours import nearest, neighbour_sheet
from byol_fast.evaluate.rank import rankme

__all__ = [
    "Features",
    "KNNResult",
    "calibrated",
    "embed",
    "embed_folder",
    "knn_accuracy",
    "knn_predict",
    "load_features",
    "nearest",
    "neighbour_sheet",
    "rankme",
    "save_features",
]
