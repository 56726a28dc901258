"""Runs that go on after the end of another one: the same steps by hand, the schedules by their formulas, the files."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import byol_fast
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.optim import RunSchedule
from byol_fast.report.build import report
from byol_fast.training.extend import extend_config
from byol_fast.training.messages import startup_summary
from byol_fast.training.metrics_file import read
from byol_fast.training.state import named_tensors
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.errors import CheckpointError
from tests.report.parsing import lines, svg, texts
from tests.training.helpers import AtStep
from tests.training.test_trainer import by_step, final_weights, same

END, TOTAL = 6, 12
"""Steps of a finished run, and of the one that extends it; an epoch has five."""
TAU = 0.99
PEAK = 1.0 * 12 / 256


def falling(step: int, steps: int) -> float:
    """The cosine of both schedules, from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def finish(config: Config) -> Path:
    return Trainer(config).fit().run_dir


def extending(run: Path, **changes: Any) -> Config:
    """Configuration of a run in the folder `longer` that extends another one."""
    changes = {"steps": TOTAL, "name": "longer"} | changes
    return configs.replace(extend_config(run, has_total=True), changes)


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights, target, buffers, momentum and probe."""
    state = trainer.state.state_dict()
    probe = {f"probe.{k}": v for k, v in enumerate(tensors_in(state["probe"]))}
    return {name: tensor.clone() for name, tensor in (named_tensors(state) | probe).items()}


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in values for tensor in tensors_in(entry)]


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_steps_after_the_end_are_those_of_a_continuation_by_hand(optimizer: str, small: Config) -> None:
    small = configs.replace(small, {"optim.name": optimizer})
    run = finish(small)
    extended = Trainer(extending(run))
    by_hand = Trainer(configs.replace(small, {"name": "by_hand", "seed": 0}))
    payload = checkpoints.load(checkpoints.path_at_step(run / "checkpoints", END))
    by_hand.model.load_state_dict(payload["model"])
    by_hand.train_step.optimizer.load_state_dict(payload["optimizer"])
    assert by_hand.state.probe is not None
    by_hand.state.probe.load_state_dict(payload["probe"])
    for _ in range(END):
        next(by_hand.loader)
    assert same(tensors(extended), tensors(by_hand))
    for step in range(3):
        lr, tau = PEAK * falling(step, TOTAL - END), 1 - (1 - TAU) * falling(step, TOTAL - END)
        by_hand.train_step.schedule = RunSchedule(
            total_steps=1, base_lr=lr, lr_schedule="constant", tau_base=tau, tau_schedule="constant"
        )
        before = tensors(by_hand)
        by_hand.train_one_step()
        extended.train_one_step()
        assert not same(tensors(by_hand), before)
        assert same(tensors(extended), tensors(by_hand)), f"step {step + 1} after the end"
    assert extended.state.step == END + 3
    extended.close()
    by_hand.close()


def test_files_of_an_extended_run_tell_of_both(small: Config, caplog: pytest.LogCaptureFixture) -> None:
    run = finish(small)
    extended = Trainer(extending(run))
    first_lines = startup_summary(extended._parts)
    result = extended.fit()
    assert result.steps == TOTAL
    assert result.images == TOTAL * 12
    records = read(result.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, TOTAL + 1)]
    assert records[:END] == read(run / "metrics.jsonl")
    for k, record in enumerate(records[END:]):
        assert math.isclose(record["lr"], PEAK * falling(k, TOTAL - END), rel_tol=1e-12)
        assert math.isclose(record["tau"], 1 - (1 - TAU) * falling(k, TOTAL - END), rel_tol=1e-12)
        assert record["epoch"] == (END + k + 1) / 5
    metadata = json.loads((result.run_dir / "encoder.json").read_text())
    assert metadata["lineage"] == {"extend": str(run), "step": END}
    assert "lineage" not in json.loads((run / "encoder.json").read_text())
    assert first_lines[0].startswith(f"extending after step {END} of {TOTAL}: cifar10_resnet18")
    assert any(
        f"from step {END} to {TOTAL}: lr 0.04688 by cosine again, without warm-up; tau 0.99 by cosine again" in line
        for line in first_lines
    )
    assert not caplog.records

    page = report([result.run_dir], pictures=False).read_text()
    assert f"To step {END}: the run tiny, which this one extends" in page
    charts = [svg(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    for key, title in (("lr", "Learning rate"), ("tau", "EMA decay of the target network")):
        (curve,) = lines(next(chart for chart in charts if title in texts(chart)))
        x, y = np.array(curve).T
        for place, values in ((x, [r["step"] for r in records]), (y, [r[key] for r in records])):
            assert np.abs(np.polyval(np.polyfit(values, place, 1), values) - place).max() < 0.02, (key, "in pixels")

    twice = Trainer(extending(result.run_dir, steps=TOTAL + 3, name="twice")).fit()
    records = read(twice.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, TOTAL + 4)]
    assert records[TOTAL]["lr"] == PEAK
    assert configs.load(twice.run_dir / "config.json").extended_at == TOTAL


@pytest.mark.parametrize("at", [8, 11], ids=["before its first checkpoint", "after it"])
def test_extension_that_crashed_and_resumed_is_the_uninterrupted_one(at: int, small: Config) -> None:
    def crash() -> None:
        raise OSError("the machine is gone")

    run = finish(small)
    whole = Trainer(extending(run, name="whole")).fit().run_dir
    crashing = Trainer(extending(run, name="cut"), callbacks=[AtStep(at, crash)])
    with pytest.raises(OSError, match="the machine is gone"):
        crashing.fit()
    cut = crashing.run_dir
    assert bool(checkpoints.saved_steps(cut / "checkpoints")) == (at == 11)
    if at == 11:
        shutil.rmtree(run)  # its own checkpoints win
    byol_fast.pretrain(resume=cut)
    assert same(final_weights(cut), final_weights(whole))
    assert by_step(cut) == by_step(whole)
    assert len(read(cut / "metrics.jsonl")) == TOTAL


def test_evaluations_go_on_and_the_new_folder_has_a_best_checkpoint(small: Config, npz: Path) -> None:
    changes = {"knn.val_root": npz, "knn.every_epochs": 1, "knn.k": 3, "knn.max_val": 30, "knn.full_at_end": True}
    small = configs.replace(small, changes)
    run = finish(small)
    result = byol_fast.pretrain(extend=run, steps=TOTAL, name="longer", keep_checkpoints=1)
    records = read(result.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records if "knn_top1" in r] == [0, 5, END, 10, TOTAL]
    assert [r["step"] for r in records if "knn_full_top1" in r] == [END, TOTAL]
    before = [r for r in records if "loss" not in r and r["step"] <= END]
    assert before == [r for r in read(run / "metrics.jsonl") if "loss" not in r]
    assert result.knn_top1_untrained == before[0]["knn_top1"]
    own = {r["step"]: r["knn_top1"] for r in records if "knn_top1" in r and r["step"] > END}
    best = next((result.run_dir / "checkpoints").glob("best_*"))
    assert best.name == f"best_step_{max(own, key=lambda step: own[step]):09d}.pt"


def test_run_that_ended_early_is_extended_from_its_last_step(small: Config) -> None:
    stopping = Trainer(small)
    stopping.callbacks.append(AtStep(4, stopping.stop))
    run = stopping.fit().run_dir
    extended = Trainer(extending(run, steps=END))
    assert extended.state.step == 4
    result = extended.fit()
    assert result.steps == END
    records = by_step(result.run_dir)
    assert records[5]["lr"] == PEAK
    assert records[6]["lr"] == PEAK / 2


def test_initial_weights_of_the_extended_run_are_not_read_again(small: Config) -> None:
    source = finish(configs.replace(small, {"name": "source", "steps": 2}))
    run = finish(configs.replace(small, {"init_from": str(source)}))
    shutil.rmtree(source)
    result = Trainer(extending(run)).fit()
    lineage = json.loads((result.run_dir / "encoder.json").read_text())["lineage"]
    assert lineage == json.loads((run / "encoder.json").read_text())["lineage"] | {"extend": str(run), "step": END}
    assert lineage["init_from"] == str(source)
    with pytest.raises(ConfigError, match=r"as it was started, but init_from was .* and is 'torchvision';"):
        Trainer(extending(run, init_from="torchvision", init_sha256="", name="other"))


@pytest.mark.parametrize("first_step", [10, 13])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps_per_epoch", [None, 5], ids=["by step", "by epoch"])
def test_schedules_of_the_added_steps(first_step: int, schedule: Any, steps_per_epoch: int | None) -> None:
    steps = 20
    extended = RunSchedule(
        total_steps=first_step + steps,
        first_step=first_step,
        base_lr=0.3,
        lr_schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        tau_base=0.9,
        tau_schedule=schedule,
    )
    for k in range(steps):
        at = k // 5 * 5 if steps_per_epoch else k
        lr_factor, factor = (falling(at, steps), falling(k, steps)) if schedule == "cosine" else (1, 1)
        assert math.isclose(extended.lr(first_step + k), 0.3 * lr_factor, rel_tol=1e-12)
        assert math.isclose(extended.tau(first_step + k), 1 - 0.1 * factor, rel_tol=1e-12)
        assert extended.constant_lr(first_step + k) == 0.3


def spoil_last(run: Path) -> None:
    path = checkpoints.path_at_step(run / "checkpoints", END)
    path.write_bytes(path.read_bytes()[:-200])


def remove_last(run: Path) -> None:
    checkpoints.path_at_step(run / "checkpoints", END).unlink()


ERRORS: dict[str, tuple[Callable[[Path], object] | None, dict[str, Any], str]] = {
    "other options": (None, {"optim.lr": 3.0}, r"extend: .* as it was started, but optim.lr was 1.0 and is 3.0; drop"),
    "no further step": (
        None,
        {"steps": END},
        r"steps must be the total, above what .* \(1.2 epochs\), got 6; give more",
    ),
    "no further epoch": (None, {"steps": 0, "epochs": 1}, r"epochs must be the total, above what .*, got 1; give more"),
    "another last step": (None, {"extended_at": 3}, r"extended_at must be the last step of .*, 6, got 3; use"),
    "no last checkpoint": (remove_last, {}, r"must hold the checkpoint of the last step, 6, it holds those of steps 3"),
    "damaged last checkpoint": (spoil_last, {}, r"no usable checkpoint \(.*000006.pt is damaged"),
    "not finished": (
        lambda run: (run / "status.json").unlink(),
        {},
        r"must be a finished run, it is not; finish it with `.* --resume .*/tiny`",
    ),
    "no run folder": (
        shutil.rmtree,
        {},
        r"tiny, which this run goes on from, has no config.json any more; put it back",
    ),
}


@pytest.mark.parametrize(("spoil", "changes", "message"), ERRORS.values(), ids=ERRORS)
def test_run_that_cannot_be_extended_leaves_no_folder(
    spoil: Callable[[Path], object] | None, changes: dict[str, Any], message: str, small: Config
) -> None:
    run = finish(small)
    config = extending(run, **changes)
    if spoil is not None:
        spoil(run)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Trainer(config)
    assert not (small.out / "longer").exists()


def test_total_without_a_further_step_is_found_once_the_images_are_listed(small: Config) -> None:
    """Two batches a step of the five of an epoch: the half of the last step is left over."""
    run = finish(configs.replace(small, {"steps": 0, "epochs": 1, "grad_accum_steps": 2}))
    with pytest.raises(ConfigError, match=r"epochs must be the total, above what .* has done, 2 steps, got 1;"):
        Trainer(extending(run, steps=0, epochs=1))
    assert Trainer(extending(run, steps=0, epochs=2)).total_steps == 5


def test_other_images_are_refused(small: Config) -> None:
    run = finish(small)
    with pytest.raises(ValueError, match="must belong to the same images and settings, but images changed"):
        Trainer(extending(run), data=np.zeros((24, 32, 32, 3), np.uint8))


def test_extend_is_refused_beside_resume_and_without_a_total(small: Config) -> None:
    with pytest.raises(ConfigError, match="extend must not be given beside resume"):
        byol_fast.pretrain(extend="runs/a", resume="runs/b")
    run = finish(small)
    with pytest.raises(ConfigError, match=r"epochs or steps must be given, .* has done 6 steps \(1.2 epochs\)"):
        byol_fast.pretrain(extend=run)
