"""What the representation is worth."""

from byol_fast.evaluate.encoder import Subject, load_subject
from byol_fast.evaluate.extract import calibrated, embed
from byol_fast.evaluate.features import Features, embed_folder, load_features, save_features
from byol_fast.evaluate.knn import KNNResult, knn_accuracy, knn_predict
from byol_fast.evaluate.neighbors import nearest
from byol_fast.evaluate.rankme import rankme
from byol_fast.evaluate.results import Evaluation
from byol_fast.evaluate.runner import evaluate_finetune, evaluate_knn, evaluate_linear

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
    "rankme",
    "save_features",
]
