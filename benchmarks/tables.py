"""Tables of results as CSV files, beside a record of the environment."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from byol_fast.utils import env
from byol_fast.utils.files import atomic_path, atomic_write


def save_table(
    folder: Path | None, name: str, columns: tuple[str, ...], rows: Iterable[Iterable[object]], *, device: str
) -> None:
    """Write NAME.csv and environment.json, of the machine and the device, into a folder; nothing if it is None."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([round(v, 6) if isinstance(v, float) else v for v in row] for row in rows)
    record = env.describe_measurement(torch.device(device))
    atomic_write(folder / "environment.json", json.dumps(record, indent=2) + "\n")
