"""Fixtures of the tests of evaluations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from byol_fast.config import Preprocessing
from byol_fast.evaluate import PretrainedEncoder
from tests.evaluate.helpers import SIZE, RecordingEncoder, network


@pytest.fixture
def pretrained() -> Iterator[PretrainedEncoder]:
    torch.manual_seed(0)
    encoder = network()
    with torch.no_grad():
        encoder(torch.randn(64, 3, SIZE, SIZE) * 2)  # BN statistics other than 0 and 1
    RecordingEncoder.calls.clear()
    yield PretrainedEncoder(
        name="tiny", encoder=encoder.eval(), preprocessing=Preprocessing(crop=SIZE), init_fn=network
    )
    RecordingEncoder.calls.clear()
