"""Whole runs on small real input: what is written, what is repeated after a crash, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import byol_fast
from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.data import Batch
from byol_fast.training.errors import Interrupted, TrainingError
from byol_fast.training.messages import startup_summary
from byol_fast.training.metrics_file import read
from byol_fast.training.resume import find_resumable
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints

# What differs between two equal runs.
CLOCK = {"images_per_second", "data_wait", "peak_memory_gib"}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    payload = checkpoints.use_latest(run / "checkpoints", checkpoints.load)
    weights: dict[str, torch.Tensor] = payload["model"]
    return weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_step(run: Path) -> dict[int, dict[str, Any]]:
    """Training records without what the clock says."""
    return {
        r["step"]: {k: v for k, v in r.items() if k not in CLOCK} for r in read(run / "metrics.jsonl") if "loss" in r
    }


def kill_in_process(config: Config, after_step: int) -> None:
    """Run `byol-fast train` in its own process, and kill it once a checkpoint of the step exists."""
    spec = config.out / "spec.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps(configs.to_dict(config)))
    code = (
        "import sys; from pathlib import Path; from byol_fast import config\n"
        "from byol_fast.cli.main import main; from byol_fast.config import recipes\n"
        "recipes.RECIPES['spec'] = lambda: config.load(Path(sys.argv[1]))\n"
        "main(['train', 'spec'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(spec)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder, deadline = config.out / config.name / "checkpoints", time.monotonic() + 120
    while not any(step >= after_step for step in checkpoints.saved_steps(folder)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_run_leaves_what_it_promises(tiny: Config) -> None:
    result = byol_fast.pretrain(recipe=tiny)
    run = tiny.out / "tiny"
    assert result.run_dir == run
    assert result.steps == 12
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "encoder.json",
        "encoder.safetensors",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "status.json",
        "tb",
    }
    assert configs.load(run / "config.json") == tiny
    records = by_step(run)
    assert list(records) == list(range(1, 13))
    assert math.isclose(result.loss, np.mean([records[s]["loss"] for s in range(3, 13)]))
    for step, record in records.items():  # the schedules restated: warm-up is a quarter of 12 steps
        tau = 1 - (1 - 0.99) * (math.cos(math.pi * (step - 1) / 12) + 1) / 2
        peak, k = 1.0 * 12 / 256, step - 1
        lr = peak * k / 3 if k < 3 else peak * (1 + math.cos(math.pi * (k - 3) / 9)) / 2
        assert math.isclose(record["tau"], tau, rel_tol=1e-12)
        assert math.isclose(record["lr"], lr, rel_tol=1e-12, abs_tol=1e-15)
        assert record["epoch"] == round(step / 5, 4)
        assert 0 < record["loss"] < 8
        assert 0 < record["embedding_std"] < 1.5
    assert checkpoints.saved_steps(run / "checkpoints") == [5, 10, 12]


def test_the_same_seed_repeats_a_run_and_another_does_not(tiny: Config) -> None:
    runs = {
        name: Trainer(configs.replace(tiny, {"name": name, "seed": seed, "steps": 3})).fit().run_dir
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    assert same(final_weights(runs["a"]), final_weights(runs["b"]))
    assert by_step(runs["a"]) == by_step(runs["b"])
    assert not same(final_weights(runs["a"]), final_weights(runs["c"]))


def test_killed_in_mid_epoch_and_resumed_with_dali_is_the_uninterrupted_run(tiny: Config) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    tiny = configs.replace(tiny, {"data.loader": "dali", "checkpoint_every": 3, "knn.k": 3})
    whole = configs.replace(tiny, {"name": "whole", "steps": 18})
    cut = configs.replace(tiny, {"name": "cut", "steps": 18})
    Trainer(whole).fit()
    kill_in_process(cut, after_step=6)
    assert not (cut.out / "cut" / "encoder.safetensors").exists()
    byol_fast.pretrain(resume=cut.out / "cut")
    assert same(final_weights(whole.out / "whole"), final_weights(cut.out / "cut"))
    assert by_step(whole.out / "whole") == by_step(cut.out / "cut")


@pytest.mark.parametrize("changes", [{}, {"num_local_views": 2, "local_view.size": 8}], ids=["", "local views"])
def test_interrupted_in_this_process_says_how_to_go_on(
    tiny: Config, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = configs.replace(tiny, changes)
    trainer = Trainer(tiny)
    step = trainer.train_step.__call__

    def interrupt_after_four(batch: Any, number: int) -> Any:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch, number)

    monkeypatch.setattr(trainer, "train_step", interrupt_after_four)
    with pytest.raises(Interrupted, match=r"saved after step 4; go on with: .* train --resume .*tiny"):
        trainer.fit()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = byol_fast.pretrain(resume=tiny.out / "tiny")
    uninterrupted = Trainer(configs.replace(tiny, {"name": "whole"})).fit()
    assert same(final_weights(result.run_dir), final_weights(uninterrupted.run_dir))


def test_stopped_during_first_and_last_evaluation_and_resumed(tiny: Config, npz: Path, photos: np.ndarray) -> None:
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    tiny = configs.replace(tiny, {"knn": {"val_root": val, "every_epochs": 1, "k": 3, "max_train": 40}})

    def stop_evaluation(trainer: Trainer, step: int) -> None:
        check = trainer._stop_evaluation_on_signal

        def stop_at_once() -> None:
            if trainer.state.step == step and not trainer._shutdown.signum:
                os.kill(os.getpid(), signal.SIGTERM)
            check()

        trainer._stop_evaluation_on_signal = stop_at_once  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match=f"saved after step {step}"):
            trainer.fit()
        assert find_resumable(configs.replace(tiny, {"name": ""})) == trainer.run_dir

    stop_evaluation(Trainer(tiny), 0)
    stop_evaluation(Trainer(tiny, resume=tiny.out / "tiny"), 12)
    resumed = Trainer(tiny, resume=tiny.out / "tiny")
    assert resumed.state.step == 12
    resumed.fit()
    whole = Trainer(configs.replace(tiny, {"name": "whole"})).fit()
    records, expected = (read(tiny.out / name / "metrics.jsonl") for name in ("tiny", "whole"))
    assert [{k: v for k, v in r.items() if k not in CLOCK} for r in records] == [
        {k: v for k, v in r.items() if k not in CLOCK} for r in expected
    ]
    assert same(final_weights(tiny.out / "tiny"), final_weights(whole.run_dir))


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(tiny: Config) -> None:
    for resume in (None, tiny.out / "tiny"):
        trainer = Trainer(configs.replace(tiny, {"log_every": 1}))

        def die() -> list[dict[str, Any]]:
            raise KeyboardInterrupt

        trainer.queue_records = die  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert (tiny.out / "tiny" / "config.json").exists()
        assert checkpoints.saved_steps(tiny.out / "tiny" / "checkpoints") == []
        again = Trainer(tiny, resume=resume)
        assert any("starting from the beginning" in note for note in startup_summary(again._parts))
        assert list(by_step(again.fit().run_dir)) == list(range(1, 13))
        shutil.rmtree(tiny.out)


def test_auto_resume_takes_only_an_unfinished_run_of_the_same_data(tiny: Config, tmp_path: Path) -> None:
    unnamed = configs.replace(tiny, {"name": ""})
    assert find_resumable(unnamed) is None
    run = Trainer(tiny).fit().run_dir
    assert find_resumable(unnamed) is None  # it is finished
    (run / "status.json").write_text('{"finished": false}')
    assert find_resumable(unnamed) == run
    assert find_resumable(configs.replace(unnamed, {"data.root": tmp_path})) is None
    assert find_resumable(configs.replace(unnamed, {"optim.lr": 3.0})) is None
    assert find_resumable(configs.replace(unnamed, {"local_view.size": 8})) == run  # there are no local views
    assert find_resumable(configs.replace(unnamed, {"num_local_views": 1, "local_view.size": 8})) is None


def test_weights_that_are_not_finite_are_not_saved(tiny: Config) -> None:
    """The update can spoil what the loss before it could not show."""
    trainer = Trainer(tiny)
    update = trainer.train_step.update_weights_and_target

    def spoil() -> None:
        update()
        if trainer.state.step == 9:
            with torch.no_grad():
                next(trainer.model.online.parameters()).fill_(math.inf)

    trainer.train_step.update_weights_and_target = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"not finite after step 10; the last good checkpoint is of step 5"):
        trainer.fit()
    assert checkpoints.saved_steps(trainer.run_dir / "checkpoints") == [5]


def test_resume_refuses_another_computation_and_says_what_differs(tiny: Config) -> None:
    run = Trainer(tiny).fit().run_dir
    with pytest.raises(ConfigError, match=r"optim.lr was 1.0 and is 2.0; .*start a new run"):
        Trainer(configs.replace(tiny, {"optim.lr": 2.0}), resume=run)
    with pytest.raises(ConfigError, match=r"num_local_views was 0 and is 1; local_view.size was 16 and is 8; drop"):
        Trainer(configs.replace(tiny, {"num_local_views": 1, "local_view.size": 8}), resume=run)
    more_threads = configs.replace(tiny, {"data.threads": 2, "local_view.size": 8})  # of which there are none
    assert Trainer(more_threads, resume=run).fit().steps == 12


def test_resume_refuses_other_images(tiny: Config, npz: Path, photos: np.ndarray) -> None:
    run = Trainer(tiny).fit().run_dir
    np.savez(npz, images=photos[::-1].copy(), labels=np.arange(60) % 3)
    with pytest.raises(ValueError, match="but images changed"):
        Trainer(tiny, resume=run)


def test_a_used_run_folder_is_not_overwritten(tiny: Config) -> None:
    run = Trainer(tiny).fit().run_dir
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="it is not empty; continue it with --resume"):
        Trainer(tiny).fit()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny: Config) -> None:
    run = Trainer(tiny).fit().run_dir
    whole = final_weights(run)
    newest = checkpoints.path_at_step(run / "checkpoints", 12)
    newest.write_bytes(newest.read_bytes()[:1000])
    assert checkpoints.use_latest(run / "checkpoints", checkpoints.load)["step"] == 10
    Trainer(tiny, resume=run).fit()
    assert same(final_weights(run), whole)


def test_steps_that_are_not_finite_are_undone_counted_and_end_the_run_when_they_do_not_stop(tiny: Config) -> None:
    trainer = Trainer(configs.replace(tiny, {"max_skipped_steps": 3, "log_every": 1}))
    step = trainer.train_step.__call__

    def spoiled(batches: list[Batch], number: int) -> Any:
        (batch,) = batches
        bad = number == 1 or number >= 7
        view1 = batch.views[0].float() * (math.nan if bad else 1 / 255)
        return step(Batch((view1, batch.views[1].float() / 255), batch.labels, batch.index), number)

    trainer.train_step = spoiled  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"3 steps in a row, to step 10, .*last good checkpoint is of step 5"):
        trainer.fit()
    records = by_step(trainer.run_dir)
    assert [s for s in records if records[s].get("skipped")] == [2, 8, 9, 10]
    assert [s for s in records if records[s]["loss"] is None] == [2, 8, 9, 10]
    assert [s for s in records if records[s]["probe_top1"] is None] == [2, 8, 9, 10]
    assert checkpoints.saved_steps(trainer.run_dir / "checkpoints") == [5]
    assert all(torch.isfinite(t).all() for t in trainer.model.state_dict().values())


def test_knn_runs_before_and_after_and_labels_do_not_touch_training(
    tiny: Config, npz: Path, photos: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    limits = {"max_train": 0, "max_val": 0}
    knn = configs.replace(
        tiny, {"name": "knn", "knn": {"val_root": val, "every_epochs": 1, "k": 1000, "temperature": 1e-3, **limits}}
    )
    with_knn, without = Trainer(knn).fit(), Trainer(tiny).fit()
    shown = " ".join(capsys.readouterr().out.split())
    records = read(with_knn.run_dir / "metrics.jsonl")
    evaluated = [r["step"] for r in records if "knn_top1" in r]
    assert evaluated == [0, 5, 10, 12]
    assert "knn_top1" in records[0]
    assert "knn_top1" in records[-1]
    # More neighbors are asked for than there are images.
    assert {r["knn_k"] for r in records if "knn_top1" in r} == {with_knn.knn_k} == {60}
    assert "knn.k of 1000 cut to 60" in shown
    assert shown.count("kNN-60 top-1") == 4
    # Every validation image is in the training set: its nearest neighbor is itself.
    assert with_knn.knn_top1 == with_knn.knn_top1_untrained == 1.0
    assert same(final_weights(with_knn.run_dir), final_weights(without.run_dir))


def test_knn_on_a_part_and_once_on_all_images(
    tiny: Config, npz: Path, photos: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """A neighbor votes for itself: 30 of 30 validation images are training images, and all of a part of the classes."""
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30], labels=np.arange(30) % 3)
    limits = {"max_train": 30, "max_val": 6, "full_at_end": True, "k": 1}
    config = configs.replace(tiny, {"knn": {"val_root": val, "every_epochs": 1, **limits}})
    result = Trainer(config).fit()
    again = Trainer(config, resume=result.run_dir).fit()
    records = [r for r in read(result.run_dir / "metrics.jsonl") if "knn_k" in r]
    *during, full = records
    assert [(r["step"], r["knn_num_train"], r["knn_num_val"]) for r in during] == [(s, 30, 6) for s in (0, 5, 10, 12)]
    assert (full["step"], full["knn_num_train"], full["knn_num_val"]) == (12, 60, 30)
    assert full["knn_full_top1"] == 1.0 and "knn_top1" not in full
    assert result == again and result.knn_top1 == during[-1]["knn_top1"] and result.knn_full_top1 == 1.0
    assert result.knn_top1_untrained == during[0]["knn_top1"]
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("on 6 of 30 validation images; RankMe") == 4
    assert shown.count("kNN-1 top-1 100.0%") >= 1 and shown.count("(all images, after the last step)") == 1


def test_knn_on_without_validation_images_is_refused(tiny: Config) -> None:
    with pytest.raises(ConfigError, match="knn.enabled is 'on', but there are no validation images"):
        Trainer(configs.replace(tiny, {"knn.enabled": "on"}))


def test_run_says_why_validation_images_are_not_used(tiny: Config, tmp_path: Path) -> None:
    assert tiny.data.root is not None
    unlabeled = tmp_path / "unlabeled.npz"
    np.savez(unlabeled, images=np.load(tiny.data.root)["images"])
    trainer = Trainer(configs.replace(tiny, {"data.root": unlabeled, "knn.val_root": unlabeled}))
    why = f"the labels of the training images cannot be used: {unlabeled} has no array `labels` (it has images)"
    assert f"no kNN evaluation: {why}" in trainer._parts.notes


def test_too_long_a_warm_up_is_refused(tiny: Config) -> None:
    with pytest.raises(ConfigError, match="optim.warmup_steps must be at most the run's 12 steps, got 13"):
        Trainer(configs.replace(tiny, {"optim.warmup_steps": 13}))


def test_gpu_asked_for_and_absent_is_explained(tiny: Config) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="device='cuda' requires a GPU"):
        Trainer(configs.replace(tiny, {"device": "cuda"}))


@pytest.mark.parametrize(
    ("method", "name"), [*itertools.product(["byol"], ["lars", "sgd", "adam", "adamw"]), ("simsiam", "sgd")]
)
def test_every_optimizer_and_method_lowers_the_loss(tiny: Config, method: str, name: str) -> None:
    lr = {"lars": 2.0, "sgd": 2.0, "adam": 0.02, "adamw": 0.02}[name]
    changes = {"method": method, "optim": {"name": name, "lr": lr, "warmup_steps": 2}, "steps": 40, "name": name}
    records = by_step(Trainer(configs.replace(tiny, changes)).fit().run_dir)
    losses = [records[s]["loss"] for s in range(1, 41)]
    before = np.mean(losses[:8])
    assert np.mean(losses[-8:]) < before - 0.1 * abs(before)


def test_pretrain_takes_arrays_and_overrides(tiny: Config, photos: np.ndarray) -> None:
    recipe = configs.replace(tiny, {"data.root": None})
    options: dict[str, Any] = {"steps": 2, "optim": {"lr": 0.5}}
    first = byol_fast.pretrain(photos, recipe, data={"threads": 1}, name="first", **options)
    by_name = byol_fast.pretrain(data=photos, recipe=recipe, name="by name", **options)
    assert (first.steps, first.loss) == (2, by_name.loss)
    config = configs.load(first.run_dir / "config.json")
    assert (config.optim.lr, config.data.threads) == (0.5, 1)


def test_bf16_autocast_trains_close_to_fp32(tiny: Config) -> None:
    """One step from the same weights on the same views: bf16 keeps 8 bits, and a loss is a mean over many products."""
    short = {"steps": 1, "optim.warmup_steps": 0}
    runs = [
        Trainer(configs.replace(tiny, {**short, "name": p, "precision": p})).fit().run_dir for p in ("fp32", "bf16")
    ]
    full, half = (by_step(run)[1]["loss"] for run in runs)
    assert half != full
    assert abs(half - full) < 0.02 * full
