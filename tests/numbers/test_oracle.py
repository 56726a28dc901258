"""The oracle against central differences and torch's autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests import oracle
from tests.numbers.helpers import (
    CHANNELS,
    PROJECTION,
    Encoder,
    errors,
    gradients,
    head,
    load,
    module_name,
    networks,
    relative_error,
    rows,
    tensor,
    views,
)


def test_oracle_loss_gradient_against_central_differences() -> None:
    p, z = rows(1, 4, 5, torch.float64), rows(2, 4, 5, torch.float64)
    gradient = oracle.regression_loss_gradient(p, z)
    for index in np.ndindex(p.shape):
        width = 1e-5 * float(np.linalg.norm(p[index[0]]))
        up, down = p.copy(), p.copy()
        up[index] += width
        down[index] -= width
        numeric = (oracle.regression_loss(up, z) - oracle.regression_loss(down, z)) / (2 * width)
        # Truncation width^2 / 6 * third derivative and cancellation 1e-16 / width, both 1e-10 in units of 1 / |p|.
        assert abs(numeric - gradient[index]) * float(np.linalg.norm(p[index[0]])) < 1e-9


def test_oracle_network_gradient_against_central_differences() -> None:
    """Every single parameter of the online network."""
    online, target = networks()
    view1, view2 = views(0)
    _, by_hand = oracle.loss_and_gradients(online.copy(), target.copy(), view1, view2)
    scale = max(float(np.abs(gradient).max()) for gradient in by_hand.values())

    # The target's side is constant, and the buffers that the passes move do not enter the loss.
    z1, z2 = oracle.project(target, view1), oracle.project(target, view2)

    def loss() -> float:
        p1, p2 = oracle.predict(online, view1, {})[0], oracle.predict(online, view2, {})[0]
        return oracle.byol_loss(p1, p2, z1, z2)

    width = 1e-6
    for name, parameter in online.parameters.items():
        numeric = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + width
            up = loss()
            parameter[index] = kept - width
            numeric[index] = (up - loss()) / (2 * width)
            parameter[index] = kept
        # Cancellation: 1e-16 * loss / width = 1e-9 of the loss's own size.
        assert np.abs(numeric - by_hand[name]).max() < 1e-7 * scale, name


def test_oracle_against_autograd() -> None:
    """Loss, every gradient and every buffer, by a plain torch network that shares nothing with the package."""
    online, target = networks()
    torch_online = nn.ModuleDict({"encoder": Encoder(), "projector": head(CHANNELS[2]), "predictor": head(PROJECTION)})
    torch_target = nn.ModuleDict({"encoder": Encoder(), "projector": head(CHANNELS[2])})
    for module, network in ((torch_online.double(), online), (torch_target.double(), target)):
        load(module, network)
    view1, view2 = views(0)
    predictions, projections = [], []
    for view in (view1, view2):
        x = tensor(view, torch.float64)
        predictions.append(torch_online["predictor"](torch_online["projector"](torch_online["encoder"](x))))
        with torch.no_grad():
            projections.append(torch_target["projector"](torch_target["encoder"](x)))
    torch_loss = torch.zeros((), dtype=torch.float64)
    for p, z in zip(predictions, reversed(projections), strict=True):
        torch_loss = torch_loss + (F.normalize(p) - F.normalize(z)).square().sum(1).mean()
    names, parameters = zip(*torch_online.named_parameters(), strict=True)
    torch_gradients = dict(zip(names, gradients(torch_loss, *parameters), strict=True))

    loss, by_hand = oracle.loss_and_gradients(online, target, view1, view2)
    assert relative_error(torch_loss, loss) < 1e-13
    assert len(torch_gradients) == len(by_hand)
    for name, gradient in by_hand.items():
        assert relative_error(torch_gradients[module_name(name)], gradient) < 1e-12, name
    for module, network in ((torch_online, online), (torch_target, target)):
        assert max(errors(module.state_dict(), network).values()) < 1e-13
