"""Batches on which networks run in train mode: none has a single image."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from byol_fast.config import Preprocessing
from byol_fast.config.evaluation import FinetuneSettings
from byol_fast.data.sources import ArraySource
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.extract import recalibrate_bn
from byol_fast.evaluate.runner import EvalContext
from byol_fast.evaluate.supervised_loader import SupervisedLoader
from byol_fast.utils.progress import Progress


def test_calibration_drops_a_batch_of_one_image() -> None:
    x = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    batches = [(part, torch.arange(len(part))) for part in torch.split(x, [4, 1])]
    network = recalibrate_bn(
        nn.Sequential(nn.BatchNorm2d(3)), batches, normalize=nn.Identity(), device=torch.device("cpu")
    )
    norm = network[0]  # type: ignore[index]
    var, mean = torch.var_mean(x[:4].double(), dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_supervised_loader_drops_one_image_that_is_left() -> None:
    source = ArraySource(np.zeros((9, 16, 16, 3), np.uint8), np.arange(9) % 2, ("ant", "bee"))
    pretrained = PretrainedEncoder(name="test", encoder=nn.Identity(), preprocessing=Preprocessing(crop=16))
    context = EvalContext(FinetuneSettings(device="cpu"), Progress())
    loader = SupervisedLoader(pretrained, source, context, batch_size=4, seed=0)
    assert loader.batches_per_epoch == 2
    assert [len(images) for images, _ in loader.batches(4)] == [4, 4, 4, 4]
