"""Checkpoints: atomic writes, checksums, and errors for damaged files."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.errors import CheckpointError
from byol_fast.utils.files import atomic_path, atomic_write


def test_oldest_checkpoints_are_deleted(tmp_path: Path) -> None:
    for step in (1, 5, 9, 200):
        checkpoints.save(tmp_path, step, {"x": torch.tensor(step)}, keep=2)
    assert checkpoints.saved_steps(tmp_path) == [9, 200]
    assert int(checkpoints.use_latest(tmp_path, checkpoints.load)["x"]) == 200


def with_checksum(content: object) -> bytes:
    """A file of torch.save with its SHA-256, as a checkpoint is."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    return data + b"\nsha256:" + hashlib.sha256(data).hexdigest().encode() + b"\n"


def test_checkpoint_just_saved_stays_beside_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {}, keep=3)
    for step in (4, 5, 9):
        checkpoints.path_at_step(tmp_path, step).write_bytes(b"damaged")
    path = checkpoints.save(tmp_path, 6, {}, keep=3, previous=3)
    assert path.exists()
    assert checkpoints.saved_steps(tmp_path) == [2, 3, 6, 9]  # 4 and 5 do not count, 9 comes later
    checkpoints.save(tmp_path, 12, {}, keep=3, previous=6)
    assert checkpoints.saved_steps(tmp_path) == [3, 6, 12]
    checkpoints.save(tmp_path, 13, {}, keep=1, previous=12)
    assert checkpoints.saved_steps(tmp_path) == [13]


def test_nothing_is_deleted_without_a_number_to_keep(tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoints.save(tmp_path, step, {})
        for _ in range(2):  # a run that is killed right afterwards does it again
            checkpoints.save_as_best(path, keep_others=True)
    names = ["best_step_000000001.pt", "best_step_000000002.pt", "step_000000001.pt", "step_000000002.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_strides_are_preserved(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    checkpoints.save(tmp_path, 1, {"w": weight}, keep=1)
    assert checkpoints.use_latest(tmp_path, checkpoints.load)["w"].stride() == weight.stride()


def test_failed_write_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, {"x": 1}, keep=1)

    def raise_disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", raise_disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*intact checkpoints: 1$"):
        checkpoints.save(tmp_path, 2, {"x": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001.pt"]
    assert checkpoints.use_latest(tmp_path, checkpoints.load)["x"] == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_interrupted_write_is_an_interruption_and_leaves_no_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's zip writer, which cannot end its archive then, raises another error."""

    class InterruptedWriter(checkpoints._DigestingWriter):
        num_writes = 0

        def write(self, data: Any) -> int:
            self.num_writes += 1
            if self.num_writes == number:
                signal.raise_signal(signal.SIGINT)
            return super().write(data)

    monkeypatch.setattr(checkpoints, "_DigestingWriter", InterruptedWriter)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 2, {"x": torch.arange(1000)})
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_removes_its_temporary_file_on_failure(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_missing_damaged_and_unknown_checkpoints_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no usable checkpoint"):
        checkpoints.use_latest(tmp_path, checkpoints.load)
    path = checkpoints.path_at_step(tmp_path, 3)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged .*restore it from a copy"):
        checkpoints.load(path)
    for content, stored in (({"format": 5, "step": 3}, "5"), ({"step": 3}, "None"), ([1], "list")):
        path.write_bytes(with_checksum(content))
        with pytest.raises(CheckpointError, match=f"must have format 4, got {stored}; .*resume with that version"):
            checkpoints.load(path)
    path.write_bytes(with_checksum({"format": 4, "step": 3}))
    assert checkpoints.load(path)["step"] == 3


def test_flipped_byte_falls_back_to_the_previous_checkpoint(tmp_path: Path) -> None:
    """Bytes of header, pickle, tensors, directory and checksum; for some of them unpickling raises odd errors."""
    for step in (1, 2):
        path = checkpoints.save(tmp_path, step, {"x": torch.arange(300) + step, "names": ["a", "b"]}, keep=2)
    data = path.read_bytes()
    rng = random.Random(0)
    positions = {*range(80), *range(len(data) - 80, len(data)), *rng.sample(range(80, len(data) - 80), 240)}
    assert len(positions) == 400
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= rng.randint(1, 255)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step_000000002.pt is damaged"):
            checkpoints.load(path)
        assert checkpoints.use_latest(tmp_path, checkpoints.load)["step"] == 1
    for size in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert checkpoints.use_latest(tmp_path, checkpoints.load)["step"] == 1


def test_skipped_checkpoints_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {}, keep=2)
    for step, content in ((3, with_checksum({"format": 3})), (4, with_checksum({"format": 4})[:-2])):
        checkpoints.path_at_step(tmp_path, step).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.use_latest(tmp_path, checkpoints.load)["step"] == 2
    newest, second, used = caplog.messages
    assert "step_000000004.pt is damaged (its checksum does not match)" in newest
    assert "step_000000003.pt must have format 4, got 3" in second
    assert used.endswith("used instead, " + str(tmp_path / "step_000000002.pt"))


def test_torch_load_reads_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 7, {"x": torch.arange(3)}, keep=1)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))


def test_best_checkpoint_is_the_fallback(tmp_path: Path) -> None:
    for step, best in ((1, False), (2, True), (3, False), (4, True), (5, False), (6, False)):
        path = checkpoints.save(tmp_path, step, {"x": step}, keep=1)
        if best:
            checkpoints.save_as_best(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_step_000000004.pt", "step_000000006.pt"]
    assert checkpoints.load(tmp_path / "best_step_000000004.pt")["x"] == 4
    path.write_bytes(b"")
    assert checkpoints.use_latest(tmp_path, checkpoints.load)["x"] == 4
    checkpoints.save(tmp_path, 3, {"x": 3}, keep=2)
    assert checkpoints.use_latest(tmp_path, checkpoints.load)["x"] == 4  # the newest that is intact, best or not


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code from a checkpoint ran",))


def test_checkpoint_with_code_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints.path_at_step(tmp_path, 2)
    torch.save({"format": 4, "x": Malicious()}, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load(path)
    path.write_bytes(with_checksum({"format": 4, "step": 2, "x": Malicious()}))
    with pytest.raises(CheckpointError, match="cannot be loaded .UnpicklingError"):
        checkpoints.load(path)
    checkpoints.save(tmp_path, 1, {"x": 1}, keep=2)
    assert checkpoints.use_latest(tmp_path, checkpoints.load)["x"] == 1
    assert capsys.readouterr().out == ""


def test_nonfinite_tensors_are_named() -> None:
    tensors = {
        "largest": torch.full((3,), 3e38),  # finite, its square is not
        "nan": torch.tensor([[1.0, math.nan]], dtype=torch.bfloat16),
        "count": torch.tensor(2**40),
        "inf": torch.tensor(-math.inf, dtype=torch.float64),
        "empty": torch.empty(0),
        "half": torch.tensor([65504.0, math.inf], dtype=torch.float16),
        "fine": torch.tensor(-1.5, dtype=torch.float64),
        "mask": torch.tensor([[0.0, -math.inf], [0.0, 0.0]]),  # of attention: a constant
        "mean": torch.tensor([0.1, -math.inf]),
        "positive": torch.tensor([0.0, math.inf]),
        "mixed": torch.tensor([0.0, -math.inf, math.nan]),
    }
    assert sorted(checkpoints.nonfinite(tensors)) == ["half", "inf", "mean", "mixed", "nan", "positive"]
    assert checkpoints.nonfinite({}) == []
