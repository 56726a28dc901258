"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.models import encoders
from tests.networks import SmallResidualNetwork
from tests.training.helpers import SMALL_RUN


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the encoder of `SMALL_RUN` in this process, for one test."""
    monkeypatch.setitem(encoders.OWN_ENCODERS, "small", lambda **_: SmallResidualNetwork())


@pytest.fixture
def small(tiny: Config, small_network: None) -> Config:
    """A run of a tenth of a second, which saves twice."""
    return configs.replace(tiny, SMALL_RUN | {"checkpoint_every": 3, "steps": 6})
