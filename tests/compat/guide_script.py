"""A script of a reader of the practical guide; only its imports were changed.

BYOL_FAST_DATA=path/to/cifar10/train python -m tests.compat.guide_script
"""

import torch
from torch import nn
from torchvision import models

from byol_fast.compat.guide import (
    BYOL,
    CIFAR10_MEAN,
    CIFAR10_STD,
    SelfSupervisedTask,
    device,
    load_data,
    logger,
    train_byol,
    transform_image,
)


def main(batch_size: int = 256, num_workers: int = 10, num_epochs: int = 10) -> BYOL:
    train_loader = load_data(batch_size=batch_size, num_workers=num_workers)
    logger.info("images are normalized with mean %s and std %s", CIFAR10_MEAN, CIFAR10_STD)

    base_model = models.resnet18()
    feature_extractor = nn.Sequential(*list(base_model.children())[:-1])
    feature_size = base_model.fc.in_features

    model = BYOL(base_model, feature_extractor, feature_size, tau=0.996).to(device)
    assert isinstance(model, SelfSupervisedTask)
    train_byol(model, train_loader, num_epochs=num_epochs, lr=0.001)

    model.eval()
    images, _ = next(iter(train_loader))
    with torch.no_grad():
        x1, x2 = transform_image(images, model)
        p1, p2, t1, t2 = model(x1, x2)
        logger.info("loss after training: %.4f", model.loss((p1, p2), (t1, t2)).item())
    return model


if __name__ == "__main__":
    main()
