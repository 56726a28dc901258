"""Every protocol on one encoder, with baselines; nearest neighbors compared with those of other libraries.

    python -m benchmarks.evaluation RUN [--train FOLDER --test FOLDER] [--max-train N] [--max-test N] [--save FOLDER]
        [--only knn linear agreement reference few all] [--epochs N] [--batch-size N] [--few-epochs N]
        [--reference-epochs N]

The time is CPU time of the process, baselines included. Agreement is the share of test images to which another
implementation of weighted nearest neighbors, or of logistic regression, assigns the same class on the same features.
Libraries that are not installed are skipped with a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.tables import save_table
from byol_fast.config.evaluation import ClassifierSettings
from byol_fast.evaluate import (
    Evaluation,
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    knn_predict,
    load_pretrained,
)
from byol_fast.evaluate.images import open_images
from byol_fast.evaluate.logistic import LogisticProblem
from byol_fast.evaluate.runner import EvalContext
from byol_fast.utils import env
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import Progress

COLUMNS = ("protocol", "candidate", "top1", "low95", "high95", "top5", "num_train", "num_test", "chosen", "cpu_seconds")
AGREEMENT_COLUMNS = ("method", "library", "version", "same_class", "images", "top1_byol_fast", "top1_library")
KNN = ((20, 0.07), (200, 0.1))


def rows_of(evaluation: Evaluation, cpu_seconds: float) -> list[list[object]]:
    s = evaluation.scores
    chosen = {k: v for k, v in evaluation.chosen.items() if not isinstance(v, dict | list)}
    counts = [evaluation.num_train, evaluation.num_test]
    own = [evaluation.protocol, "this encoder", s.top1, *s.top1_ci95, s.top5, *counts, json.dumps(chosen)]
    rows: list[list[object]] = [[*own, round(cpu_seconds, 1)]]
    rows += [[evaluation.protocol, b.name, b.top1, *b.top1_ci95, b.top5, *counts, "", ""] for b in evaluation.baselines]
    return rows


def agreement(run: Path, train: Path | None, test: Path | None, sizes: ClassifierSettings) -> list[list[object]]:
    pretrained, context = load_pretrained(run), EvalContext(sizes, Progress())
    images = open_images(pretrained, train, test, sizes)
    encoder = context.to_device(pretrained.encoder)
    train_x, train_y = context.features(pretrained, encoder, images.train, "")
    test_x, test_y = (t.cpu() for t in context.features(pretrained, encoder, images.test, ""))
    train_x, train_y = train_x.cpu(), train_y.cpu()
    classes = len(images.classes)
    rows: list[list[object]] = []

    def compare(method: str, library: str, predictions: torch.Tensor, others: torch.Tensor) -> None:
        same = (predictions == others).double().mean().item()
        accuracies = [(guess == test_y).double().mean().item() for guess in (predictions, others)]
        rows.append([method, library, env.version(library), same, len(predictions), *accuracies])
        print(
            f"{method}, {library}: {same:.2%} of {len(predictions)} images get the same class; "
            f"top-1 {accuracies[0]:.2%}, {accuracies[1]:.2%}"
        )

    for k, temperature in KNN:
        predictions = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=classes)[:, 0]
        name = f"knn k={k} T={temperature}"
        for library, predict in (("scikit-learn", _sklearn_knn), ("lightly", _lightly_knn)):
            try:
                others = predict(train_x, train_y, test_x, k, temperature, classes)
            except ImportError:
                print(f"{library} is not installed (pip install '.[dev,peers]')")
                continue
            compare(name, library, predictions, others)
    model = LogisticProblem(train_x, train_y, num_classes=classes).fit(0.01)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return rows
    standard = ((train_x - model.mean) / model.scale).numpy()
    fitted = LogisticRegression(C=1 / (0.01 * len(train_x)), max_iter=2000).fit(standard, train_y.numpy())
    guess = fitted.predict(((test_x - model.mean) / model.scale).numpy())
    compare("logistic regression l2=0.01", "scikit-learn", model.logits(test_x).argmax(1), torch.from_numpy(guess))
    return rows


def _sklearn_knn(train_x: Any, train_y: Any, test_x: Any, k: int, temperature: float, _: int) -> torch.Tensor:
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    classifier.fit(train_x.numpy(), train_y.numpy())
    return torch.from_numpy(classifier.predict(test_x.numpy()))


def _lightly_knn(train_x: Any, train_y: Any, test_x: Any, k: int, temperature: float, classes: int) -> torch.Tensor:
    from lightly.utils.benchmarking import knn_predict as others

    bank = F.normalize(train_x).T
    pieces = [
        others(F.normalize(x), bank, train_y, classes, knn_k=k, knn_t=temperature)[:, 0] for x in test_x.split(1000)
    ]
    return torch.cat(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--max-train", type=int, default=10_000)
    parser.add_argument("--max-test", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=30, help="fine-tuning on all labels")
    parser.add_argument("--batch-size", type=int, default=256, help="fine-tuning on all labels")
    parser.add_argument("--few-epochs", type=int, default=30, help="fine-tuning on 1 and 10 %% of the labels")
    parser.add_argument("--reference-epochs", type=int, default=80)
    parser.add_argument("--only", nargs="*", default=["knn", "linear", "agreement", "reference", "few", "all"])
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    common: dict[str, Any] = {"max_train": options.max_train, "max_test": options.max_test, "baselines": True}
    common |= {"output_dir": options.run / "eval", "progress": Progress(PlainConsole())}
    images = (options.run, options.train, options.test)
    few = {"epochs": (options.few_epochs,), **common}
    every = {"epochs": (options.epochs,), "batch_size": options.batch_size, **common}
    reference = {"protocol": "reference", "epochs": options.reference_epochs, "batch_size": 256, **common}
    protocols: dict[str, list[Callable[[], Evaluation]]] = {
        "knn": [lambda: evaluate_knn(*images, k=(20, 1, 5, 100, 200), temperature=0.07, **common)],
        "linear": [lambda: evaluate_linear(*images, **common)],
        "reference": [lambda: evaluate_linear(*images, **reference)],
        "few": [
            lambda: evaluate_finetune(*images, labels=(0.01,), **few)[0],
            lambda: evaluate_finetune(*images, labels=(0.1,), **few)[0],
        ],
        "all": [lambda: evaluate_finetune(*images, labels=(1.0,), **every)[0]],
    }
    rows: list[list[object]] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as the protocols choose by default
    for name in options.only:
        if name == "agreement":
            save_table(
                options.save,
                "agreement",
                AGREEMENT_COLUMNS,
                agreement(*images, ClassifierSettings(max_train=options.max_train, max_test=options.max_test)),
                device=device,
            )
            continue
        for evaluate in protocols[name]:
            start = time.process_time()
            evaluation = evaluate()
            new_rows = rows_of(evaluation, time.process_time() - start)
            rows += new_rows
            for row in new_rows:
                print(f"{row[0]:18s} {row[1]:30s} {row[2]:.2%} [{row[3]:.2%} - {row[4]:.2%}] {row[8]}", flush=True)
            save_table(options.save, "evaluation", COLUMNS, rows, device=device)


if __name__ == "__main__":
    main()
