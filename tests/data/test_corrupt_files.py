"""Corrupt images: explained, or skipped independently of loader, prefetching and restarts."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast import Trainer
from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing, replace
from byol_fast.data import CorruptImageError, eval_batches, open_source
from byol_fast.data.decode import decode, decode_jpeg, has_common_kind, reader_of
from byol_fast.data.integrity import CorruptImages, TooManyCorruptImagesError, check_bytes
from byol_fast.data.loaders.image_reader import for_dali
from byol_fast.data.sources import FileSource
from byol_fast.utils import checkpoint as checkpoints
from tests.data.corrupt_files import CORRUPT, DAMAGED, JPEG, SIZE, UNUSUAL, by_pil, config, fill, outcome
from tests.data.helpers import config_of, error, loader_of, pixels, same
from tests.data.kinds import available, make
from tests.data.test_resume import CORRUPT as CORRUPT_INDEX
from tests.data.test_resume import VIEW1, VIEW2, pictures, with_one_corrupt


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_file_is_explained(kind: str, files_backend: str, tmp_path: Path) -> None:
    name, data, message = CORRUPT[kind]
    fill(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        CorruptImageError, match=rf"image: .*{name} ({message}).*; replace it .*--data\.on-corrupt skip"
    ) as caught:
        loader = loader_of(open_source(tmp_path), config(files_backend, "raise"))
        for _ in range(3):
            next(loader)
    assert caught.value.path == tmp_path / name
    with pytest.raises(CorruptImageError, match=rf"{name} ({message})"):
        list(
            eval_batches(
                open_source(tmp_path),
                Preprocessing(crop=SIZE),
                4,
                loader="dali" if "dali" in files_backend else "threaded",
            )
        )


@pytest.mark.parametrize("kind", DAMAGED)
def test_file_damaged_during_the_run(kind: str, files_backend: str) -> None:
    damage, message = DAMAGED[kind]
    for policy, prefix in (("raise", ""), ("skip", "skipped: ")):
        with tempfile.TemporaryDirectory() as temporary:  # pytest's own folder is closed to other users
            folder = Path(temporary)
            fill(folder)
            (folder / "x.jpg").write_bytes(JPEG)
            assert re.match(prefix + message, outcome(folder, files_backend, policy, damage))


def group_of(kind: str) -> str:
    """The way of a file into DALI: read by it, converted though it has the name of such a file, or passed as bytes."""
    name, data, _, _ = UNUSUAL[kind]
    if not name.lower().endswith(("jpg", "jpeg", "png")):
        return "bytes"
    return "by name" if has_common_kind(reader_of(data)) else "converted"


@pytest.mark.parametrize("group", ["by name", "converted", "bytes"])
def test_unusual_files_are_read(group: str, files_backend: str, tmp_path: Path) -> None:
    """All in one batch, against the pixels they were written from, and once for evaluation."""
    expected = {}
    unusual = [UNUSUAL[kind] for kind in UNUSUAL if group_of(kind) == group]
    for number, (name, data, pixels_of, tolerance) in enumerate(unusual):
        path = tmp_path / f"{number} {name}"
        path.write_bytes(data)
        expected[str(path)] = pixels_of, tolerance
    source = open_source(tmp_path)
    assert isinstance(source, FileSource) and len(source) == len(unusual)
    batch = next(loader_of(source, replace(config(files_backend, "raise"), {"batch_size": len(unusual)})))
    for i, got in zip(batch.index.tolist(), pixels(batch.views[0]), strict=True):
        true, tolerance = expected[str(source.path(i))]
        assert error(got, true).mean() <= tolerance, source.sample_name(i)
        if (true == true[..., :1]).all():
            assert (got == got[..., :1]).all(), source.sample_name(i)
    loader: Literal["dali", "threaded"] = "dali" if "dali" in files_backend else "threaded"
    assert sum(len(index) for _, index in eval_batches(source, Preprocessing(crop=SIZE), 8, loader=loader)) == len(
        unusual
    )


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_image_is_the_same_for_all_readers(kind: str) -> None:
    """To the bit, also as the input of DALI; and that of PIL, apart from 16 bits, which PIL clips."""
    data = UNUSUAL[kind][1]
    image = np.asarray(decode(data))
    pixels_of_torch = decode_jpeg(data)
    encoded = for_dali(data)
    assert check_bytes(data) is None and not isinstance(encoded, str)
    if pixels_of_torch is not None:
        np.testing.assert_array_equal(pixels_of_torch[0].permute(1, 2, 0), image)
    np.testing.assert_array_equal(np.asarray(decode(encoded.tobytes())), image)
    with contextlib.suppress(ValueError, OSError):  # PIL refuses damaged texts, and long ones
        true = by_pil(data)
        is_clipped = Image.open(io.BytesIO(data)).mode.startswith("I")
        assert is_clipped or (true == image).all()


def test_rows_of_corrupt_files_are_replaced(files_backend: str, files: FileSource, tmp_path: Path) -> None:
    """A view depends on its image alone: the others, and replacements, are as without a corrupt file."""
    for folder in ("bad", "good"):
        (tmp_path / folder).mkdir()
        for i in range(8):
            (tmp_path / folder / f"{i}.jpg").write_bytes(files.path(i).read_bytes())
    (tmp_path / "bad" / "5.jpg").write_bytes(b"not an image")
    skipping = replace(config_of(files_backend, VIEW1, VIEW2), {"data.on_corrupt": "skip"})
    expected, result = (next(loader_of(open_source(tmp_path / name), skipping)) for name in ("good", "bad"))
    assert 5 in expected.index.tolist() and 5 not in result.index.tolist()
    where = [expected.index.tolist().index(i) for i in result.index.tolist()]
    assert torch.equal(result.views[0], expected.views[0][where]) and torch.equal(
        result.views[1], expected.views[1][where]
    )


def fill_with_corrupt(folder: Path, good: int = 30) -> set[str]:
    """Write intact images and every kind of corrupt file; returns the names of the corrupt files."""
    folder.mkdir(exist_ok=True)
    fill(folder, good)
    names = set()
    for number, (name, data, _) in enumerate(CORRUPT.values()):
        (folder / f"{number} {name}").write_bytes(data)
        names.add(f"{number} {name}")
    return names


def test_corrupt_files_are_passed_over(backend: str, tmp_path: Path) -> None:
    """Intact images stay at their positions; every corrupt file is reported once."""
    bad = fill_with_corrupt(tmp_path / "images")
    source = open_source(tmp_path / "images")
    report = tmp_path / "run" / "corrupt_images.jsonl"
    loader = loader_of(source, config(backend, "skip"), corrupt_list=report)
    clean = loader_of(source, config("threaded", "skip")).sampler  # type: ignore[attr-defined]
    assert loader.batches_per_epoch == len(source) // 8
    seen = []
    for number in range(3 * loader.batches_per_epoch):
        batch = next(loader)
        before = clean(number).index
        stays = np.array([Path(source.sample_name(int(i))).name not in bad for i in before])
        assert np.array_equal(batch.index.numpy()[stays], before[stays])
        assert not {Path(source.sample_name(i)).name for i in batch.index.tolist()} & bad
        seen.append(batch.index)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {Path(line["image"]).name for line in lines} == bad and len(lines) == len(bad)
    assert all(source.sample_name(line["index"]) == line["image"] and line["reason"] for line in lines)
    other = loader_of(source, config("threaded", "skip"))
    assert all(torch.equal(next(other).index, index) for index in seen)


def test_replacements_do_not_depend_on_prefetching_or_restarts(backend: str, tmp_path: Path) -> None:
    fill_with_corrupt(tmp_path)
    source = open_source(tmp_path)
    batches = {}
    for ahead in (1, 4):
        loader = loader_of(source, replace(config(backend, "skip"), {"data.prefetch": ahead}))
        batches[ahead] = [next(loader) for _ in range(8)]
    assert all(same(a, b) for a, b in zip(batches[1], batches[4], strict=True))
    loader = loader_of(source, config(backend, "skip"))
    for _ in range(3):
        next(loader)
    resumed = loader_of(source, config(backend, "skip"))
    resumed.load_state_dict(loader.state_dict())
    assert all(same(next(resumed), b) for b in batches[1][3:])


@pytest.mark.parametrize("kind", [kind for kind in available() if kind != "array"])
def test_corrupt_image_of_every_source_is_named_or_skipped(kind: str, backend: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path / "x", with_one_corrupt(pictures()))
    views = {"view1": {"size": 16}, "view2": {"size": 16}, "batch_size": 20}
    with pytest.raises(CorruptImageError) as caught:
        loader = loader_of(source, replace(config(backend, "raise"), views))
        next(loader), next(loader)
    assert str(caught.value.path) == source.sample_name(CORRUPT_INDEX)
    assert caught.value.reason.startswith("cannot be read (OSError" if kind == "dataset" else "is a truncated JPEG")
    loader = loader_of(source, replace(config(backend, "skip"), views))
    index = torch.cat([next(loader).index, next(loader).index])
    assert CORRUPT_INDEX not in index.tolist() and len(set(index.tolist())) == 39
    loader_name: Any = backend
    with pytest.raises(CorruptImageError):
        list(eval_batches(source, Preprocessing(crop=16), 7, loader=loader_name))
    indices = torch.cat(
        [i for _, i in eval_batches(source, Preprocessing(crop=16), 7, loader=loader_name, on_corrupt="skip")]
    )
    assert indices.tolist() == [i for i in range(40) if i != CORRUPT_INDEX]


def test_evaluation_skips_corrupt_files(backend: str, tmp_path: Path) -> None:
    bad = fill_with_corrupt(tmp_path, good=30)
    source = open_source(tmp_path)
    name: Any = backend
    whole: dict[int, torch.Tensor] = {}
    for batch, index in eval_batches(source, Preprocessing(crop=SIZE), 4, loader=name, on_corrupt="skip"):
        whole |= dict(zip(index.tolist(), batch, strict=True))
    assert [Path(source.sample_name(i)).name for i in whole] == sorted(f"good {i}.png" for i in range(30))
    assert len(whole) + len(bad) == len(source)
    good = open_source(tmp_path).subset(np.array(list(whole)))
    for batch, index in eval_batches(good, Preprocessing(crop=SIZE), 4, loader=name):
        for image, i in zip(batch, index.tolist(), strict=True):
            assert torch.equal(image, whole[list(whole)[i]])


def test_loader_continues_after_the_file_is_replaced(backend: str, tmp_path: Path) -> None:
    fill(tmp_path, 40)
    whole = loader_of(open_source(tmp_path), config(backend, "raise"))
    expected = [next(whole) for _ in range(5)]
    source = open_source(tmp_path)
    assert isinstance(source, FileSource)
    victim = source.path(int(expected[3].index[2]))
    good = victim.read_bytes()
    victim.write_bytes(b"")
    loader = loader_of(source, config(backend, "raise"))
    got = []
    with pytest.raises(CorruptImageError, match="is empty"):
        while True:
            got.append(next(loader))
    state = loader.state_dict()
    assert state["batch_number"] == len(got) <= 3
    victim.write_bytes(good)
    resumed = loader_of(open_source(tmp_path), config(backend, "raise"))
    resumed.load_state_dict(state)
    for one in (loader, resumed):
        assert all(same(next(one), b) for b in expected[len(got) :])
    assert all(same(a, b) for a, b in zip(got, expected, strict=False))


def test_too_many_corrupt_images_stop_the_run(backend: str, tmp_path: Path) -> None:
    fill(tmp_path, 12)
    for i in range(13):
        (tmp_path / f"bad {i}.jpg").write_bytes(b"")
    loader = loader_of(open_source(tmp_path), config(backend, "skip"), corrupt_list=tmp_path / "run" / "bad.jsonl")
    message = r"13 of 25 images cannot be read \(listed in .*bad\.jsonl\), more than the 12 that a run skips; the"
    with pytest.raises(TooManyCorruptImagesError, match=message):
        for _ in range(6):
            next(loader)
    assert len((tmp_path / "run" / "bad.jsonl").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("total", "share", "limit"),
    [(20, 0.01, 10), (150, 0.01, 75), (1000, 0.01, 100), (50_000, 0.01, 500), (1000, 0.3, 300), (1000, 1.0, 500)],
)
def test_corrupt_image_limit(total: int, share: float, limit: int) -> None:
    bad = CorruptImages(str, total, on_corrupt="skip", max_fraction=share)
    bad.add([(i, "is empty") for i in range(limit)], batch_number=0)
    with pytest.raises(TooManyCorruptImagesError, match=f"more than the {limit} that"):
        bad.add([(limit, "is empty")], batch_number=1)


def test_list_of_corrupt_images_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corrupt_images.jsonl"
    path.mkdir()
    bad = CorruptImages(str, 20, on_corrupt="skip", corrupt_list=path)
    bad.add([(3, "is empty")], batch_number=0)
    assert bad.state_dict() == [[3, "is empty", 0]]
    assert caplog.messages[0].startswith(f"the list of corrupt images, {path}, could not be written")
    assert list(tmp_path.iterdir()) == [path]


def test_intact_images_keep_their_views(tmp_path: Path) -> None:
    """Corrupt images do not change the views of the others."""
    images = pictures()
    views = {"view1": {"size": VIEW1.size}, "view2": {"size": VIEW2.size}}
    good = loader_of(make("tar", tmp_path / "good", images), replace(config("threaded", "skip"), views))
    bad = loader_of(make("tar", tmp_path / "bad", with_one_corrupt(images)), replace(config("threaded", "skip"), views))
    for _ in range(10):
        a, b = next(good), next(bad)
        rows = a.index == b.index
        assert (~rows).sum() == (a.index == CORRUPT_INDEX).sum() <= 1
        assert torch.equal(a.views[0][rows], b.views[0][rows]) and torch.equal(a.views[1][rows], b.views[1][rows])


@pytest.fixture
def small_run(tiny: Config, tmp_path: Path) -> Config:
    return replace(tiny, {"data.root": tmp_path / "data", "batch_size": 8, "steps": 6, "checkpoint_every": 2})


def test_resume_with_skip_equals_a_run_with_skip(small_run: Config, tmp_path: Path) -> None:
    """The fix that the error suggests: resume with --data.on-corrupt skip."""
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data", 40)
    whole = Trainer(replace(small_run, {"name": "whole"})).fit()
    fourth = loader_of(open_source(tmp_path / "data"), small_run)
    index = [next(fourth).index for _ in range(4)][3]
    (tmp_path / "data" / Path(open_source(tmp_path / "data").sample_name(int(index[5]))).name).write_bytes(b"")
    with pytest.raises(CorruptImageError, match="is empty"):
        Trainer(replace(small_run, {"name": "stopped"})).fit()
    stopped = tmp_path / "runs" / "stopped"
    assert 0 < max(checkpoints.saved_steps(stopped / "checkpoints")) <= 3
    skip = {"data.on_corrupt": "skip"}
    resumed = Trainer(replace(small_run, {"name": "stopped", **skip}), resume=stopped).fit()
    straight = Trainer(replace(small_run, {"name": "straight", **skip})).fit()
    assert resumed.encoder.read_bytes() == straight.encoder.read_bytes() != whole.encoder.read_bytes()
    reports = [(run / "corrupt_images.jsonl").read_text() for run in (stopped, straight.run_dir)]
    assert reports[0] == reports[1] and reports[0].count("is empty") == 1


def test_run_with_skip_reports_corrupt_files(small_run: Config, tmp_path: Path, caplog: Any) -> None:
    """Training and both kNN sets; resuming after the files were replaced needs --data.accept-changed."""
    images = {part: tmp_path / "data" / part for part in ("train", "val")}
    for part, count in (("train", 30), ("val", 12)):
        for name in ("cat", "dog"):
            (images[part] / name).mkdir(parents=True)
            fill(images[part] / name, count // 2)
        (images[part] / "cat" / "cut.jpg").write_bytes(JPEG[:300])
        (images[part] / "dog" / "empty.jpg").write_bytes(b"")
    run = replace(small_run, {"name": "stopped"})
    with pytest.raises(CorruptImageError, match=r"(cut|empty)\.jpg"):
        Trainer(run).fit()
    skipping = replace(run, {"data.on_corrupt": "skip", "name": "clean"})
    result = Trainer(skipping).fit()
    assert result.steps == 6 and result.knn_top1 is not None
    lines = [json.loads(line) for line in (result.run_dir / "corrupt_images.jsonl").read_text().splitlines()]
    assert {Path(line["image"]).name for line in lines} == {"cut.jpg", "empty.jpg"}
    assert all("/train/" in line["image"] for line in lines)
    assert "empty.jpg is empty (0 bytes): evaluated without it" in caplog.text
    (images["train"] / "cat" / "cut.jpg").write_bytes(JPEG)
    (images["train"] / "dog" / "empty.jpg").unlink()
    with pytest.raises(ValueError, match=r"images changed .*--data\.accept-changed"):
        Trainer(skipping, resume=result.run_dir)
    Trainer(replace(skipping, {"data.accept_changed": True}), resume=result.run_dir).fit()
    assert not configs.load(result.run_dir / "config.json").data.accept_changed  # applies to one resume
