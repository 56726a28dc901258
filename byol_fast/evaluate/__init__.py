"""Evaluation of encoders with labels, and features of images."""

from byol_fast.evaluate.encoder import PretrainedEncoder, load_pretrained
from byol_fast.evaluate.extract import extract_features, recalibrate_bn
from byol_fast.evaluate.features import Features, embed_folder, load_features, save_features
from byol_fast.evaluate.finetune import evaluate_finetune
from byol_fast.evaluate.knn import KNNResult, evaluate_knn, knn_accuracy, knn_predict
from byol_fast.evaluate.linear import evaluate_linear
from byol_fast.evaluate.neighbors import nearest
from byol_fast.evaluate.rankme import rankme
from byol_fast.evaluate.results import Evaluation, RetrievalEvaluation
from byol_fast.evaluate.retrieval import evaluate_retrieval

__all__ = [
    "Evaluation",
    "Features",
    "KNNResult",
    "PretrainedEncoder",
    "RetrievalEvaluation",
    "embed_folder",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_retrieval",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "load_features",
    "load_pretrained",
    "nearest",
    "rankme",
    "recalibrate_bn",
    "save_features",
]
