"""Reading `metrics.jsonl`; without torch, so that a run folder is checked before it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.records import count, number, read_json_lines, record_of

Record = dict[str, Any]

_NUMBERS = ("epoch", "loss", "embedding_std", "images_per_second", "knn_top1", "knn_full_top1")
_RECORD = record_of({"step": count} | dict.fromkeys(_NUMBERS, number))


def read(path: Path) -> list[Record]:
    """All whole records of a metrics file; damaged lines are left out, as is a last one cut off by a crash."""
    return parse(path)[0]


def parse(path: Path) -> tuple[list[Record], list[int]]:
    """Records of a metrics file, and the numbers of its damaged lines, without a last one cut off by a crash."""
    records: list[Record] = []
    damaged: list[int] = []
    try:
        lines = list(read_json_lines(path))
    except OSError as error:
        raise CheckpointError(f"metrics: {path} cannot be read ({error}); make it a readable file") from error
    for line in lines:
        if line.content is not None and _RECORD(line.content, "") is None and "step" in line.content:
            records.append(line.content)
        elif line.is_whole:
            damaged.append(line.number)
    return records, damaged
