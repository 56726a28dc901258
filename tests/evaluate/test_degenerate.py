"""Evaluations of collapsed and diverged encoders, and of labels that are no classes."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from byol_fast.evaluate import PretrainedEncoder, evaluate_knn
from tests.evaluate.helpers import CPU, PROTOCOLS, RecordingEncoder, labeled_images, run


def set_norm(pretrained: PretrainedEncoder, weight: float, bias: float) -> None:
    nn.init.constant_(pretrained.encoder[1].weight, weight)  # type: ignore[index]
    nn.init.constant_(pretrained.encoder[1].bias, bias)  # type: ignore[index]


@pytest.mark.parametrize(("factor", "shown"), [(1e17, "7.32e.16"), (1e-13, "7.32e-14")])
def test_features_out_of_range_are_refused(factor: float, shown: str, pretrained: PretrainedEncoder) -> None:
    set_norm(pretrained, factor, 0.0)
    with pytest.raises(ValueError, match=f"largest feature of tiny must be 1e-10 to 1e.15 in size, got {shown}"):
        evaluate_knn(pretrained, labeled_images(30, 0), labeled_images(15, 1), **CPU)


@pytest.mark.parametrize("protocol", PROTOCOLS[:3])
def test_collapsed_encoder_is_named(
    protocol: str, pretrained: PretrainedEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    set_norm(pretrained, 0.0, 0.3)
    result = run(protocol, pretrained, labeled_images(30, 0), labeled_images(15, 1))
    assert result.top1 == pytest.approx(1 / 3)  # one class for all images
    assert "test images: all 15 images have the same features; the network is collapsed" in caplog.text


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
def test_classifier_that_cannot_fit_is_refused(
    protocol: str, pretrained: PretrainedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byol_fast.evaluate.runner.total_memory", lambda device: 100)
    with pytest.raises(ValueError, match="classifier of 3 classes needs 0 GiB, cpu has 0; check that the labels are"):
        run(protocol, pretrained, labeled_images(30, 0), labeled_images(15, 1))


@pytest.mark.parametrize("protocol", ["linear", "linear_reference"])
def test_label_per_image_is_refused_before_the_work(protocol: str, pretrained: PretrainedEncoder) -> None:
    names = tuple(map(str, range(30)))
    sources = [labeled_images(30, seed).with_labels(np.arange(30), names) for seed in (0, 1)]
    with pytest.raises(ValueError, match="must be held out for model selection, but no class has two"):
        run(protocol, pretrained, *sources)
    assert not RecordingEncoder.calls
