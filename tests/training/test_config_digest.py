"""The digest by which a recorded result is compared with a recipe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from byol_fast import config as configs
from byol_fast.config import Config, recipes
from byol_fast.training.resume import config_digest


def test_digest_is_of_the_fields_that_differ_from_their_defaults() -> None:
    assert config_digest(Config()) == hashlib.sha256(b"{}").hexdigest()[:12]
    config = configs.replace(Config(), {"epochs": 7, "optim.lr": 0.5})
    assert config_digest(config) == hashlib.sha256(b'{"epochs": 7, "optim.lr": 0.5}').hexdigest()[:12]


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.lr": 0.11},
        {"optim.name": "adam"},
        {"epochs": 6},
        {"view2.scale": (0.31, 1.0)},
        {"model.hidden_dim": 511},
        {"tau.schedule": "constant"},
        {"knn.k": 19},
        {"precision": "bf16"},
        {"data.builtin": "none"},
        {"num_local_views": 1},
        {"init_from": "weights.pth"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_digest_follows_what_is_computed(changes: dict[str, Any]) -> None:
    assert config_digest(configs.replace(recipes.demo(), changes)) != config_digest(recipes.demo())


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "out": Path("elsewhere"), "recipe": "other", "seed": 3, "device": "cuda"},
        {"data.root": Path("images"), "data.loader": "device_cache", "data.threads": 1, "mode": "graph"},
        {"knn.every_epochs": 1, "knn.max_val": 100, "knn.full_at_end": True, "log": (), "checkpoint_every": 5},
        {"local_view.size": 8, "local_view.blur_p": 0.3},
    ],
    ids=["names", "execution", "evaluation", "views that there are none of"],
)
def test_digest_ignores_names_execution_evaluation_and_unused_views(changes: dict[str, Any]) -> None:
    assert config_digest(configs.replace(recipes.demo(), changes)) == config_digest(recipes.demo())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_digest_survives_json(name: str) -> None:
    config = recipes.get(name)
    assert config_digest(configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))) == config_digest(config)
