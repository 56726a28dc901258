"""Images and run folders as people have them, good, odd and damaged: the paths of the seeded command lines.

`write_data` makes everything that takes no training; `write_runs` damages copies of one finished run; `copy` gives a
command its own.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.kinds import encoded, write_tar

SIZE = 24
GOOD_RUN = "runs/good"
IMAGES = (
    "good", "flat", "gray", "shapes", "one_class", "wrong_labels", "empty", "only_hidden", "odd_names", "special",
    "links", "broken", "unreadable_files", "unreadable_folder", "system_files", "case_splits", "empty_class",
    "lone_picture", "tiny", "black",
    "one.png", "truncated.jpg", "fifo.jpg", "zero.jpg", "null", "file.txt", "dangling.jpg",
    "list.txt", "labels.csv", "missing.txt", "empty.txt", "binary.txt", "blank.csv", "other_columns.csv", "fifo.txt",
    "good.tar", "empty.tar", "truncated.tar", "links.tar", "text.tar", "odd_names.tar", "shards", "shards_link",
    "shards/part-{000..001}.tar", "shards/part-{000..009}.tar", "shards/part-{001..000}.tar", "shards/{part-000}.tar",
    "shards/part-{0..99999999}.tar", "shards/part-*.tar", "shards/part-{a..b}.tar",
    "good.parquet", "empty.parquet", "no_images.parquet", "paths.parquet", "unlabeled.parquet", "text_labels.parquet",
    "float_labels.parquet", "truncated.parquet", "text.parquet", "parquet_folder",
    "good.npz", "no_labels.npz", "no_images.npz", "floats.npz", "two_dimensions.npz", "other_length.npz",
    "float_labels.npz", "unlabeled.npz", "objects.npz", "no_rows.npz", "huge_header.npz", "truncated.npz",
    "text.npz", "array.npy",
)  # fmt: skip
"""Below the zoo: what may be given where images are asked for."""
RUNS = (
    "no_config", "config_list", "config_text", "config_number", "config_unknown_field", "config_wrong_type",
    "config_huge", "config_binary", "no_weights", "truncated_weights", "empty_weights", "text_weights",
    "metadata_empty", "metadata_list", "metadata_strings", "metadata_null", "metadata_huge", "metadata_binary",
    "metrics_strings", "metrics_nan", "metrics_truncated", "metrics_binary", "metrics_empty", "metrics_lists",
    "environment_strings", "environment_list", "environment_binary", "eval_strings", "eval_list", "eval_truncated",
    "eval_binary", "status_list", "status_binary", "no_checkpoints", "truncated_checkpoint", "empty_checkpoint",
    "text_checkpoint", "other_shapes", "moved_images", "read_only", "profile_strings", "corrupt_list_strings",
    "checkpoints_file", "tb_file", "eval_file", "metrics_folder",
)  # fmt: skip
"""Damaged copies of the good run, in `runs`."""

ALWAYS = ("flat", "shards", "folder", "read_only", "file.txt")
"""Copied even if no word names them."""
FIFOS = ("fifo.jpg", "fifo.txt", "special/fifo.jpg")
MODES = {"unreadable_files/a/1.png": 0, "unreadable_folder/b": 0, "read_only": 0o555, "runs/read_only": 0o555}


def _picture(seed: int, height: int = SIZE, width: int = SIZE) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def _save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def _encoded(seed: int, kind: str = "PNG") -> bytes:
    return encoded(_picture(seed), kind)


def _fill(folder: Path, count: int, first: int = 0, suffix: str = ".png") -> None:
    for i in range(count):
        _save(folder / f"{first + i}{suffix}", _picture(first + i))


def write_data(zoo: Path) -> None:
    """Write everything of `IMAGES`."""
    for part, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("blue", "red")):
            _fill(zoo / "good" / part / name, count, 100 * number + 50 * (part == "val"))
    _fill(zoo / "flat", 12, suffix=".jpg")
    _write_images(zoo)
    _write_odd_folders(zoo)
    _write_files(zoo)
    _write_lists(zoo)
    _write_tars(zoo)
    _write_tables(zoo)
    _write_arrays(zoo)
    _write_outputs(zoo)


def _write_images(zoo: Path) -> None:
    for i in range(8):
        _save(zoo / "gray" / f"{i}.png", _picture(i).convert("L"))
        _save(zoo / "black" / f"{i}.png", Image.new("RGB", (SIZE, SIZE)))
        _save(zoo / "tiny" / f"{i}.png", Image.new("RGB", (1, 1), (i, i, i)))
        for part, name in (("train", f"c{i % 2}"), ("val", f"d{i % 2}")):
            _save(zoo / "wrong_labels" / part / name / f"{i}.png", _picture(i))
        for part in ("train", "val"):
            _save(zoo / "one_class" / part / "only" / f"{i}.png", _picture(i))
    shapes = zoo / "shapes"
    for height, width in ((2, 100), (100, 2), (1, 60), (60, 1)):
        _save(shapes / f"{height}x{width}.png", _picture(1, height, width))
    modes = {"RGBA": ".png", "P": ".gif", "1": ".png", "I": ".tiff", "CMYK": ".jpg", "LA": ".png", "F": ".tiff"}
    for mode, suffix in modes.items():
        _save(shapes / f"{mode}{suffix}", _picture(2).convert("L" if mode in "IF" else "RGB").convert(mode))
    frames = [_picture(i) for i in range(3)]
    _save(shapes / "animated.gif", frames[0], save_all=True, append_images=frames[1:])
    _save(shapes / "progressive.jpg", frames[0], progressive=True)
    broken = zoo / "broken"
    _fill(broken, 6, suffix=".jpg")
    (broken / "cut.jpg").write_bytes((broken / "0.jpg").read_bytes()[:300])
    (broken / "empty.jpg").write_bytes(b"")
    (broken / "text.jpg").write_text("no image\n")
    (broken / "no_end.png").write_bytes(_encoded(1)[:-12])


def _write_odd_folders(zoo: Path) -> None:
    for name in ("empty", "only_hidden"):
        (zoo / name).mkdir()
    _fill(zoo / "only_hidden" / ".trash", 3)
    for part in ("Train", "TEST"):
        _fill(zoo / "case_splits" / part / "a", 4)
    names = [
        "line\nfeed",
        "quote'\"",
        "percent%s%d",
        "[/b][red]",
        "brackets{0..9}",
        "x" * 200,
        "ünï",
        "-dash",
        " space ",
    ]
    for i, name in enumerate([*names, os.fsdecode(b"latin-\xe9")]):
        for part in ("train", "val"):
            _fill(zoo / "odd_names" / part / name, 2, 10 * i)
            _save(zoo / "odd_names" / part / name / f"{name[:100]}.png", _picture(i))
    for name in ("a", "@eaDir", "__MACOSX", ".git", ".ipynb_checkpoints"):
        _fill(zoo / "system_files" / name, 4)
    (zoo / "system_files" / "a" / "._0.png").write_bytes(b"AppleDouble")
    (zoo / "system_files" / "Thumbs.db").write_bytes(b"thumbnails")
    for name in ("a", "b"):
        _fill(zoo / "empty_class" / name, 4)
        _fill(zoo / "lone_picture" / name, 4)
    (zoo / "empty_class" / "c").mkdir()
    _save(zoo / "lone_picture" / "cover.png", _picture(1))
    special = zoo / "special"
    _fill(special, 4)
    (special / "zero.jpg").symlink_to("/dev/zero")
    (special / "null.png").symlink_to("/dev/null")
    links = zoo / "links"
    _fill(links / "a", 4)
    (links / "b").symlink_to("a")
    (links / "loop").symlink_to(".")
    (links / "self.png").symlink_to("self.png")
    (links / "gone.png").symlink_to("nowhere.png")
    for name in ("unreadable_files", "unreadable_folder"):
        _fill(zoo / name / "a", 4)
        _fill(zoo / name / "b", 4)


def _write_files(zoo: Path) -> None:
    (zoo / "one.png").write_bytes(_encoded(1))
    (zoo / "truncated.jpg").write_bytes(_encoded(1, "JPEG")[:200])
    (zoo / "zero.jpg").symlink_to("/dev/zero")
    (zoo / "null").symlink_to("/dev/null")
    (zoo / "dangling.jpg").symlink_to("nowhere")
    for name in ("file.txt", "text.tar", "text.parquet", "text.npz"):
        (zoo / name).write_text("some text\n")


def _write_lists(zoo: Path) -> None:
    names = [f"flat/{i}.jpg" for i in range(12)]
    (zoo / "list.txt").write_text("\n".join(names) + "\n")
    (zoo / "labels.csv").write_text("path,label\n" + "".join(f"{n},{i % 3}\n" for i, n in enumerate(names)))
    (zoo / "missing.txt").write_text("\n".join([*names, "flat/nowhere.jpg"]) + "\n")
    (zoo / "empty.txt").write_text("")
    (zoo / "blank.csv").write_text("\n\n\n")
    (zoo / "other_columns.csv").write_text("a,b,c\n1,2,3\n")
    (zoo / "binary.txt").write_bytes(bytes(range(256)) * 4)


def _write_tars(zoo: Path) -> None:
    (zoo / "shards").mkdir()
    (zoo / "shards_link").symlink_to("shards")
    for number, name in enumerate(("good", "shards/part-000", "shards/part-001")):
        keys = [f"{number}{i:03}" for i in range(8)]
        pairs = [((f"{key}.png", _encoded(i)), (f"{key}.cls", str(i % 2).encode())) for i, key in enumerate(keys)]
        write_tar(zoo / f"{name}.tar", [member for pair in pairs for member in pair])
    write_tar(zoo / "empty.tar", [])
    data = (zoo / "good.tar").read_bytes()
    (zoo / "truncated.tar").write_bytes(data[: len(data) // 2 + 100])
    write_tar(zoo / "links.tar", [(f"a/{i}.png", _encoded(i)) for i in range(4)])
    links = ((tarfile.SYMTYPE, "0.png"), (tarfile.LNKTYPE, "a/1.png"), (tarfile.SYMTYPE, "/etc/passwd"))
    with tarfile.open(zoo / "links.tar", "a") as tar:
        for i, (kind, target) in enumerate((*links, (tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, ""))):
            member = tarfile.TarInfo(f"a/special-{i}.png")
            member.type, member.linkname = kind, target
            tar.addfile(member)
    names = ("a\nb", "[/b]", "../above", "/absolute", os.fsdecode(b"\xe9"), "x" * 300, ".hidden")
    members = [(f"{name}/{i}.png", _encoded(i)) for i, name in enumerate(names)]
    write_tar(zoo / "odd_names.tar", members, encoding="utf-8", errors="surrogateescape")


def _write_tables(zoo: Path) -> None:
    images = [{"bytes": _encoded(i), "path": f"{i}.png"} for i in range(12)]
    labels = {
        "good": pa.array([i % 3 for i in range(12)]),
        "unlabeled": pa.array([-1 if i == 5 else i % 3 for i in range(12)]),
        "text_labels": pa.array([f"c{i % 2}" for i in range(12)]).dictionary_encode(),
        "float_labels": pa.array([i / 2 for i in range(12)]),
    }
    for name, column in labels.items():
        pq.write_table(pa.table({"image": images, "label": column}), zoo / f"{name}.parquet")
    pq.write_table(pa.table({"image": images}).slice(0, 0), zoo / "empty.parquet")
    pq.write_table(pa.table({"x": [1, 2], "y": ["a", "b"]}), zoo / "no_images.parquet")
    pq.write_table(pa.table({"image": ["flat/0.jpg", "flat/1.jpg"], "label": [0, 1]}), zoo / "paths.parquet")
    data = (zoo / "good.parquet").read_bytes()
    (zoo / "truncated.parquet").write_bytes(data[: len(data) // 2])
    (zoo / "parquet_folder").mkdir()
    for name in ("train-0", "test-0"):
        shutil.copy(zoo / "good.parquet", zoo / "parquet_folder" / f"{name}.parquet")


def _write_arrays(zoo: Path) -> None:
    images = np.stack([np.asarray(_picture(i)) for i in range(16)])
    labels = np.arange(16) % 2
    arrays: dict[str, dict[str, Any]] = {
        "good": {"images": images, "labels": labels},
        "no_labels": {"images": images},
        "no_images": {"pixels": images},
        "floats": {"images": images / 255},
        "two_dimensions": {"images": images[0, :, :, 0]},
        "other_length": {"images": images, "labels": labels[:3]},
        "float_labels": {"images": images, "labels": labels / 3},
        "unlabeled": {"images": images, "labels": labels - 1},
        "objects": {"images": np.array([images[0], "text"], dtype=object)},
        "no_rows": {"images": images[:0]},
    }
    for name, content in arrays.items():
        np.savez(zoo / f"{name}.npz", **content)
    data = (zoo / "good.npz").read_bytes()
    (zoo / "truncated.npz").write_bytes(data[: len(data) // 2])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, SIZE, SIZE, 3)}
    )
    with zipfile.ZipFile(zoo / "huge_header.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + images.tobytes())
    np.save(zoo / "array.npy", images)


def _write_outputs(zoo: Path) -> None:
    for name in ("folder", "folder.html", "folder.npz", "folder.png", "read_only"):
        (zoo / name).mkdir()


def copy(zoo: Path, folder: Path, words: Sequence[str]) -> None:
    """Copy what some words name, and add what cannot be copied: FIFOs, and files that cannot be read or written."""
    (folder / "runs").mkdir(parents=True)
    for path in (*zoo.iterdir(), *zoo.glob("runs/*")):
        if path.name != "runs" and (path.name in ALWAYS or any(path.name in word for word in words)):
            target = folder / path.relative_to(zoo)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target, symlinks=True)
            else:
                shutil.copy2(path, target, follow_symlinks=False)
    for name in FIFOS:
        if (folder / name).parent.exists():
            os.mkfifo(folder / name)
    for name, mode in MODES.items():
        if (folder / name).exists():
            (folder / name).chmod(mode)


def write_runs(zoo: Path) -> None:
    """Write everything of `RUNS` beside the good run, from copies of it."""
    for name in RUNS:
        shutil.copytree(zoo / GOOD_RUN, zoo / "runs" / name)
        _damage(zoo / "runs" / name, name)


def _damage(run: Path, name: str) -> None:
    prefix, _, kind = name.partition("_")
    files = {
        "config": "config.json", "metadata": "encoder.json", "metrics": "metrics.jsonl", "status": "status.json",
        "environment": "environment.json",
    }  # fmt: skip
    if name in _SPECIAL:
        _SPECIAL[name](run)
    elif prefix == "eval":
        for path in (run / "eval").glob("*.json"):
            _damage_file(path, kind)
    elif kind == "checkpoint":
        for path in (run / "checkpoints").glob("*.pt"):
            _damage_file(path, prefix)
    elif kind == "weights":
        _damage_file(run / "encoder.safetensors", prefix)
    else:
        _damage_file(run / files[prefix], kind)


def _damage_file(path: Path, kind: str) -> None:
    if kind == "no":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind in _CONTENTS:
        path.write_bytes(_CONTENTS[kind])
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else []
        values = lines or [json.loads(path.read_text())]
        path.write_text("".join(json.dumps(_changed(value, kind)) + "\n" for value in values))


_CONTENTS = {
    "binary": bytes(range(256)), "text": b"some text\n", "list": b"[1, 2]\n", "lists": b"[1, 2]\n[]\n",
    "number": b"3\n", "empty": b"",
}  # fmt: skip


def _changed(value: Any, kind: str) -> Any:
    """Every number of JSON values as a string, null, NaN or a huge number; a field of another name or type."""
    if kind == "unknown_field":
        return {**value, "nonsense": 1}
    if kind == "wrong_type":
        return {**value, "batch_size": "12", "view1": 3}
    if isinstance(value, dict):
        return {k: _changed(v, kind) for k, v in value.items()}
    if isinstance(value, list):
        return [_changed(v, kind) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"strings": f"<b>{value}", "null": None, "nan": float("nan"), "huge": 10**19}[kind]
    return value


def _other_shapes(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["hidden_dim"] *= 2
    (run / "config.json").write_text(json.dumps(config))


def _moved_images(run: Path) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace("/good", "/nowhere"))


def _replace_by_file(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("some text\n")


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _profile_of_strings(run: Path) -> None:
    (run / "profile").mkdir()
    (run / "profile" / "profile.json").write_text('{"format": "2", "step": "fast", "findings": [3]}')


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "no_config": lambda run: (run / "config.json").unlink(),
    "no_checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "other_shapes": _other_shapes,
    "moved_images": _moved_images,
    "read_only": lambda run: None,  # see MODES
    "profile_strings": _profile_of_strings,
    "corrupt_list_strings": lambda run: (run / "corrupt_images.jsonl").write_text('"text"\n{"image": 3}\n\xff\n'),
    "checkpoints_file": lambda run: _replace_by_file(run / "checkpoints"),
    "tb_file": lambda run: _replace_by_file(run / "tb"),
    "eval_file": lambda run: _replace_by_file(run / "eval"),
    "metrics_folder": lambda run: _replace_by_folder(run / "metrics.jsonl"),
}
