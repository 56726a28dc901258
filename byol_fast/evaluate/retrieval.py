"""Evaluation by retrieval: images of a query's class among all other images, by the cosine similarity of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byol_fast.config.evaluation import RetrievalSettings
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.images import labels_of, open_test_images
from byol_fast.evaluate.results import Recall, RetrievalEvaluation, RetrievalScores
from byol_fast.evaluate.runner import Entry, EvalRun
from byol_fast.utils.intervals import mean_interval, share_interval
from byol_fast.utils.progress import Progress

RECALL_KS = (1, 5, 10)
MAX_SIMILARITIES = 1 << 23
"""Similarities that are in memory at a time; they and sorting take about 60 bytes for each."""


def evaluate_retrieval(
    encoder: str | Path | PretrainedEncoder,
    test: object = None,
    *,
    settings: RetrievalSettings | None = None,
    output_dir: Path | None = None,
    progress: Progress | None = None,
    on_result: Callable[[RetrievalEvaluation], None] | None = None,
    **changes: Any,
) -> RetrievalEvaluation:
    """Evaluate an encoder by retrieval: each test image is a query, and ranks all others; see `retrieval_scores`.

    The untrained encoder of the baselines gets its BN statistics from the test images.

    Args:
        encoder: as for `evaluate_knn`.
        test: labeled images, anything that `byol_fast.data.open_source` takes. None: the validation images of the run.
        settings: as for `evaluate_knn`.
        output_dir: folder that the record `retrieval.json` is written to; None: none is written.
        progress: as for `evaluate_knn`.
        on_result: as for `evaluate_knn`.
        **changes: fields of the settings to replace.

    Raises:
        ValueError: the images or settings do not fit.
        ConfigError: the folder cannot be written.

    Examples:
        >>> evaluate_retrieval("runs/first", "photos/val").scores.mean_ap
    """
    run = EvalRun(
        encoder, settings or RetrievalSettings(), changes, output_dir=output_dir, progress=progress, on_result=on_result
    )
    with run.progress.shown():
        source = open_test_images(run.pretrained, test, run.settings)
    run.progress.print(f"test images: {source.describe()}")
    find_queries(labels_of(source))  # raises before the work

    def evaluate(entry: Entry) -> RetrievalScores:
        x, y = entry.features(source, "test images")
        with run.progress.bar(len(x), f"{entry.name}: retrieval") as bar:
            return retrieval_scores(entry.name, x, y, on_queries=bar.update)

    scores, *baselines = [evaluate(entry) for entry in run.entries(source)]
    result = RetrievalEvaluation(
        protocol="retrieval",
        test=source.describe(),
        num_test=scores.num_queries + scores.num_left_out,
        scores=scores,
        baselines=tuple(baselines),
        **run.origin(),
    )
    run.record(result)
    return result


@torch.no_grad()
def retrieval_scores(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    on_queries: Callable[[int], None] = lambda count: None,
    max_similarities: int = MAX_SIMILARITIES,
) -> RetrievalScores:
    """Mean average precision over whole rankings, and recall at 1, 5 and 10.

    Each image is a query that ranks all others by cosine similarity. Average precision is the mean, over the images of
    the query's class, of the share of its class among all images up to there; recall at k is the share of queries with
    an image of their class among the first k (arXiv 1511.06452). Similarities are computed in float64 and compared in
    fp32. Of equally similar images those of other classes come first, whatever their order: features that are all equal
    do not pass for good ones.

    Args:
        name: of the encoder, or of a baseline.
        x: features `[N, D]`, normalized or not.
        y: classes, int64 `[N]`, 0 or more, on the same device.
        on_queries: called with the number of finished queries.
        max_similarities: bounds memory.

    Raises:
        ValueError: no class has two images.
    """
    queries = find_queries(y)
    x = F.normalize(x.double(), dim=1)
    ranks = torch.arange(1, len(x) + 1, device=x.device)
    precisions, hits = [], []
    done = 0
    for rows in torch.split(queries, max(max_similarities // len(x), 1)):
        # In fp32 the last bit of a product depends on its place in the matrix: equal images would differ in similarity.
        similarity = (x[rows] @ x.T).float()
        is_relevant = _rank_others(similarity, y[rows, None] == y, rows)
        precision = is_relevant.cumsum(dim=1) / ranks * is_relevant
        precisions.append(precision.sum(dim=1, dtype=torch.float64) / is_relevant.sum(dim=1))
        hits.append(torch.stack([is_relevant[:, :k].any(dim=1) for k in RECALL_KS], dim=1))
        done += len(rows)
        on_queries(done)
    mean_ap, interval = mean_interval(torch.cat(precisions).tolist())
    recalls = torch.cat(hits).double().mean(dim=0).tolist()
    return RetrievalScores(
        name=name,
        mean_ap=mean_ap,
        mean_ap_ci95=interval,
        recall=tuple(
            Recall(k, recall, share_interval(recall, len(queries)))
            for k, recall in zip(RECALL_KS, recalls, strict=True)
        ),
        num_queries=len(queries),
        num_left_out=len(x) - len(queries),
    )


def _rank_others(similarity: Tensor, is_relevant: Tensor, rows: Tensor) -> Tensor:
    """Relevance of the images in the order of each query's ranking, bool `[Q, N]`; the query itself is the last.

    Args:
        similarity: of the queries and all images, fp32 `[Q, N]`, between -2 and 2.
        is_relevant: True for images of the query's class `[Q, N]`.
        rows: positions of the queries `[Q]`.
    """
    # Integers that are ordered as the similarities, so that the last bit can order equal ones: the bits of a positive
    # number are, those of a negative one are reversed. Below 2 they are less than 2^30, and doubled ones fit.
    bits = similarity.view(torch.int32)
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) * 2 - is_relevant.int()
    keys.scatter_(1, rows[:, None], torch.iinfo(torch.int32).min)
    return (keys.sort(dim=1, descending=True).values & 1).bool()


def find_queries(y: Tensor) -> Tensor:
    """Positions of the images that are not the only one of their class, int64 `[Q]`.

    Args:
        y: classes, int64 `[N]`, 0 or more.

    Raises:
        ValueError: there are none.
    """
    queries = (y.bincount()[y] > 1).nonzero()[:, 0]
    if not len(queries):
        raise ValueError(
            f"eval: a query needs a second image of its class, but each of the {len(y)} test images has a class of its "
            "own; add images (also with max_test)"
        )
    return queries
