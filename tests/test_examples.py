"""The README's Python, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import byol_fast
import byol_kernels

README = (Path(__file__).parents[1] / "README.md").read_text()


def code(beginning: str) -> str:
    """The README's code block in which a line begins so."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (found,) = [block for block in blocks if re.search(f"^{re.escape(beginning)}", block, re.MULTILINE)]
    return str(found)


def views(count: int, size: int, batch: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 2, batch, 3, size, size), dtype=torch.uint8, generator=generator)
    return [(pair[0], pair[1]) for pair in images]


def test_the_loop_of_ones_own_trains() -> None:
    text = code("model = byol_fast.BYOL").replace('"resnet50"', '"resnet18_narrow"').replace("224", "32")
    names: dict[str, Any] = {"byol_fast": byol_fast, "byol_kernels": byol_kernels, "your_loader": views(2, 32)}
    torch.manual_seed(0)
    exec(text, names)
    model = names["model"]
    target, online = model.target_parameters(), model.trainable_parameters()
    # Moved by 1 - tau of the online network's movement, and no further.
    apart = [float((t - o).detach().abs().max()) for t, o in zip(target, online, strict=False)]
    assert max(apart) > 0
    assert all(p.grad is None for p in online)


def test_the_callback_ends_a_run_early_and_exports(tiny: byol_fast.Config, photos: Any, tmp_path: Path) -> None:
    names: dict[str, Any] = {"byol_fast": byol_fast}
    exec(code("class EarlyStopping").partition("byol_fast.pretrain")[0], names)
    import numpy as np

    np.savez(tmp_path / "val.npz", images=photos[:30], labels=np.arange(30) % 3)
    config = byol_fast.config.replace(tiny, {"knn": {"val_root": tmp_path / "val.npz", "every_epochs": 1, "k": 1}})
    # Every validation image is its own neighbour: accuracy 1 at every evaluation, the first that counts after an epoch.
    result = byol_fast.Trainer(config, callbacks=[names["EarlyStopping"]()]).fit()
    assert result.steps == 5
    assert result.encoder.exists()


@pytest.mark.peers
def test_the_lightning_module_trains() -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pip install byol_fast[peers]")
    names: dict[str, Any] = {"byol_fast": byol_fast, "byol_kernels": byol_kernels, "lightning": lightning}
    exec(code("class Learner"), names)
    torch.manual_seed(0)
    learner = names["Learner"]()
    before = [p.detach().clone() for p in learner.model.target_parameters()]
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(learner, cast("Any", torch.utils.data.DataLoader)(views(3, 32), batch_size=None))
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.model.target_parameters(), strict=True))
