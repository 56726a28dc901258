"""Checkpoints: atomic writes, checksums, and errors for damaged files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.checkpoint import CheckpointError
from byol_fast.utils.files import atomic_path, atomic_write


def test_oldest_checkpoints_are_deleted(tmp_path: Path) -> None:
    for step in (1, 5, 9, 200):
        checkpoints.save(tmp_path, step, {"x": torch.tensor(step)}, keep=2)
    assert checkpoints.saved_steps(tmp_path) == [9, 200]
    assert int(checkpoints.load_latest(tmp_path)["x"]) == 200


def test_strides_are_preserved(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    checkpoints.save(tmp_path, 1, {"w": weight}, keep=1)
    assert checkpoints.load_latest(tmp_path)["w"].stride() == weight.stride()


def test_failed_write_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, {"x": 1}, keep=1)

    def raise_disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", raise_disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*intact checkpoints: 1$"):
        checkpoints.save(tmp_path, 2, {"x": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001.pt"]
    assert checkpoints.load_latest(tmp_path)["x"] == 1


def test_atomic_path_removes_its_temporary_file_on_failure(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_missing_damaged_and_unknown_checkpoints_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no usable checkpoint"):
        checkpoints.load_latest(tmp_path)
    path = checkpoints.path_at_step(tmp_path, 3)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged .*delete it to use an earlier one"):
        checkpoints.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match=r"must have format 4, got 99; .*resume with that version"):
        checkpoints.load(path)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_flipped_bit_falls_back_to_the_previous_checkpoint(tmp_path: Path, where: float) -> None:
    for step in (1, 2):
        path = checkpoints.save(tmp_path, step, {"x": torch.arange(10_000) + step}, keep=2)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="step_000000002.pt is damaged"):
        checkpoints.load(path)
    assert checkpoints.load_latest(tmp_path)["step"] == 1


def test_torch_load_reads_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 7, {"x": torch.arange(3)}, keep=1)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))


def test_best_checkpoint_is_the_fallback(tmp_path: Path) -> None:
    for step, best in ((1, False), (2, True), (3, False), (4, True), (5, False), (6, False)):
        path = checkpoints.save(tmp_path, step, {"x": step}, keep=1)
        if best:
            checkpoints.save_as_best(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_step_000000004.pt", "step_000000006.pt"]
    best_path = checkpoints.best_path(tmp_path)
    assert best_path is not None
    assert checkpoints.load(best_path)["x"] == 4
    path.write_bytes(b"")
    assert checkpoints.load_latest(tmp_path)["x"] == 4


def test_checkpoint_with_code_is_rejected(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code from a checkpoint ran",))

    path = checkpoints.path_at_step(tmp_path, 1)
    torch.save({"format": 2, "x": Malicious()}, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load(path)
