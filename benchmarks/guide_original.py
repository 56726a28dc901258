"""The practical guide's module, rewritten from its description: `byol_fast.compat.guide` replaces it.

Images pass one at a time, as normalized floats, through `ToPILImage` (where values outside 0..1 wrap around) and
torchvision's transforms; each view passes each network on its own; the EMA is a loop; errors of a step are logged and
ignored.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
logger = logging.getLogger(__name__)

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class SelfSupervisedTask(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def loss(self, *outputs: Any) -> Any:
        raise NotImplementedError

    def transform(self, image: Any) -> Any:
        raise NotImplementedError


def mlp(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))


class BYOL(SelfSupervisedTask):
    def __init__(
        self, base_model: nn.Module, feature_extractor: nn.Module, feature_size: int, tau: float = 0.996
    ) -> None:
        super().__init__(base_model)
        self.online_encoder = nn.Sequential(feature_extractor, nn.Flatten(), mlp(feature_size))
        self.target_encoder = copy.deepcopy(self.online_encoder)
        self.predictor = mlp(256)
        self.tau = tau
        self.augment = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
                transforms.RandomGrayscale(p=0.2),
                transforms.GaussianBlur(kernel_size=3),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p1 = self.predictor(self.online_encoder(x1))
        p2 = self.predictor(self.online_encoder(x2))
        with torch.no_grad():
            t1 = self.target_encoder(x1)
            t2 = self.target_encoder(x2)
        return p1, p2, t1, t2

    def loss(self, predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        (p1, p2), (t1, t2) = predictions, targets
        return self.regression_loss(p1, t2) + self.regression_loss(p2, t1)

    @staticmethod
    def regression_loss(p: Tensor, t: Tensor) -> Tensor:
        p, t = F.normalize(p, dim=-1), F.normalize(t, dim=-1)
        return (2 - 2 * (p * t).sum(dim=-1)).mean()

    def update_target_network(self) -> None:
        for online, target in zip(self.online_encoder.parameters(), self.target_encoder.parameters(), strict=True):
            target.data = self.tau * target.data + (1 - self.tau) * online.data

    def transform(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.augment(image), self.augment(image)


def transform_image(images: Tensor, model: BYOL) -> tuple[Tensor, Tensor]:
    pairs = [model.transform(image) for image in images]
    where = next(model.parameters()).device
    return torch.stack([a for a, _ in pairs]).to(where), torch.stack([b for _, b in pairs]).to(where)


def train_byol(
    model: BYOL, train_loader: Iterable[tuple[Tensor, Tensor]], num_epochs: int = 10, lr: float = 0.001
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for epoch in range(num_epochs):
        for i, (images, _) in enumerate(train_loader):
            try:
                x1, x2 = transform_image(images, model)
                p1, p2, t1, t2 = model(x1, x2)
                loss = model.loss((p1, p2), (t1, t2))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                model.update_target_network()
                if i % 100 == 0:
                    logger.info("Epoch [%d/%d], Step [%d], Loss: %.4f", epoch + 1, num_epochs, i, loss.item())
            except Exception as error:
                logger.error("Error in step %d: %s", i, error)
