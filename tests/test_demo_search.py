"""Search for the demo's settings: images it may see, settings it tries, and the one that the demo has."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import numpy as np

from benchmarks.demo_search import (
    BEFORE,
    FOLDER,
    HELD_OUT,
    MIDDLE,
    SPACE,
    config_of,
    neighbors,
    random_settings,
    write_images,
)
from byol_fast.config import recipes
from byol_fast.data.sources import open_train_val
from byol_fast.data.sources.arrays import open_demo

FIELDS = {
    "size": "view1.size",
    "smallest_crop": "view1.scale",
    "batch_size": "batch_size",
    "lr": "optim.lr",
    "tau": "tau.base",
    "jitter": "view1.contrast",
    "blur_p": "view2.blur_p",
}


def test_search_sees_training_images_only(tmp_path: Path) -> None:
    """The held-out ones are the last of each class; none of the validation images is used."""
    write_images(tmp_path)
    train, held_out = open_train_val(config_of(BEFORE, tmp_path, steps=1))
    source, _ = open_demo()
    assert held_out is not None and held_out.labels is not None and source.labels is not None
    assert np.array_equal(np.bincount(held_out.labels), np.full(10, HELD_OUT))
    parts = np.concatenate(
        [np.stack([np.asarray(part.load(i)) for i in range(len(part))]) for part in (train, held_out)]
    )
    last = np.concatenate([np.flatnonzero(source.labels == label)[-HELD_OUT:] for label in range(10)])
    order = np.concatenate([np.setdiff1d(np.arange(len(source)), last), np.sort(last)])
    assert np.array_equal(parts, source.images[order])


def test_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    other = {name: values[-1] for name, values in SPACE.items()}
    before, after = config_of(BEFORE, tmp_path, steps=9), config_of(other, tmp_path, steps=9)
    for name, field in FIELDS.items():
        expected = (other[name], 1.0) if name == "smallest_crop" else other[name]
        assert attrgetter(field)(after) == expected
    assert before.view1 == before.view2 and before.steps == 9


def test_neighbors_differ_in_one_value_by_one_place() -> None:
    near = neighbors(BEFORE)
    assert len(near) == 14  # two each: no value is the first or last of those tried
    at_the_edge = neighbors(BEFORE | {"size": SPACE["size"][0], "tau": SPACE["tau"][-1]})
    assert len(at_the_edge) == 12
    for settings in near:
        (name,) = (name for name in SPACE if settings[name] != BEFORE[name])
        assert abs(SPACE[name].index(settings[name]) - SPACE[name].index(BEFORE[name])) == 1


def test_first_round_is_always_the_same() -> None:
    first, again = random_settings(24), random_settings(24)
    assert first == again and first[0] == BEFORE
    assert len({json.dumps(settings) for settings in first}) == 24
    assert random_settings(8) == first[:8]


def test_demo_has_the_best_settings_of_the_middle_round(tmp_path: Path) -> None:
    trials = [json.loads(line) for line in (FOLDER / "search.jsonl").read_text().splitlines()]
    best = max((line for line in trials if line.get("cpu_seconds") == MIDDLE), key=lambda line: line["score"])
    chosen, demo = config_of(best["trial"], tmp_path, steps=1), recipes.demo()
    for field in FIELDS.values():
        assert attrgetter(field)(chosen) == attrgetter(field)(demo), field
