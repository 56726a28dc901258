"""What the representation is worth."""

from byol_fast.evaluate.embed import calibrated, embed
from byol_fast.evaluate.features import Features, embed_folder, load_features, save_features
from byol_fast.evaluate.inputs import Subject, load_subject
from byol_fast.evaluate.judge import evaluate_finetune, evaluate_knn, evaluate_linear
from byol_fast.evaluate.knn import KNNResult, knn_accuracy, knn_predict
from byol_fast.evaluate.neighbours import nearest, neighbour_sheet
from byol_fast.evaluate.rank import rankme
from byol_fast.evaluate.results import Evaluation

__all__ = [
    "Evaluation",
    "Features",
    "KNNResult",
    "Subject",
    "calibrated",
    "embed",
    "embed_folder",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "knn_accuracy",
    "knn_predict",
    "load_features",
    "load_subject",
    "nearest",
    "neighbour_sheet",
    "rankme",
    "save_features",
]
