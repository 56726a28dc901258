"""Bounds of all numbers in configurations and options, types of the fields, and choices in the Python API."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.bench.options import Options as BenchOptions
from byol_fast.cli import embed
from byol_fast.config import (
    Config,
    ConfigError,
    DataConfig,
    KNNConfig,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    ViewConfig,
    evaluation,
    recipes,
    schema,
)
from byol_fast.config.evaluation import FinetuneSettings, LinearSettings
from byol_fast.config.fields import Range, check
from byol_fast.data import eval_batches
from byol_fast.data.loaders.threads import single_core_threads
from byol_fast.data.sources import ArraySource
from byol_fast.doctor.main import ScanData
from byol_fast.export.formats import export_as
from byol_fast.models import BYOL, SimSiam
from byol_fast.models.layers import Normalize
from byol_fast.optim import RunSchedule
from byol_fast.profiling import roofline, stated
from byol_fast.training.train_step import TrainStep
from byol_fast.utils.device import resolve_device
from byol_fast.utils.precision import resolve_precision
from byol_kernels import resized_crop

KINDS: list[Any] = [
    kind
    for module in (schema, evaluation)
    for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)
    if kind.__module__ == module.__name__
] + [embed.Options, ScanData, BenchOptions]
SMALL = {name: ViewConfig(size=1) for name in ("view1", "view2", "local_view")} | {"data": DataConfig(prefetch=1)}
REQUIRED: dict[Any, dict[str, Any]] = {Config: SMALL, embed.Options: {"encoder": Path("run"), "folder": Path("images")}}


def range_of(hint: Any) -> Range | None:
    """Bounds of a number, also in a tuple or beside None."""
    own = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Range)]
    return own[0] if own else next(filter(None, map(range_of, get_args(hint))), None)


def ranges(kind: Any) -> dict[str, Range]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: limits for name, hint in hints.items() if (limits := range_of(hint)) is not None}


CASES = [(kind, name, limits.low, limits.high) for kind in KINDS for name, limits in ranges(kind).items()]


def made(kind: Any, name: str, value: Any) -> Any:
    """The field of an object that is made with a value; tuples hold it as often as their default has values."""
    default = kind.__dataclass_fields__[name].default
    options = dict(REQUIRED.get(kind, {}))
    if kind is LinearSettings and name in {"lr", "epochs", "batch_size"}:
        options["protocol"] = "reference"
    if name == "extended_at" and value:
        options["extend"] = Path("run")
    values = (value,) * max(len(default), 1) if type(default) is tuple else value
    return getattr(kind(**options, **{name: values}), name)


def test_bounds_keep_out_what_fills_the_memory_or_overflows() -> None:
    for kind, names, low, high in (
        (ModelConfig, ("hidden_dim", "projection_dim", "predictor_hidden_dim"), 1, 65_536),
        (ModelConfig, ("std",), 1e-3, 1e3),
        (DataConfig, ("threads",), 0, 1024),
        (DataConfig, ("prefetch",), 1, 64),
        (ViewConfig, ("blur_kernel",), 0, 501),
        (ViewConfig, ("brightness", "contrast", "saturation"), 0, 10),
        (Config, ("seed",), 0, 2**31 - 1),
        (KNNConfig, ("k",), 1, 10_000),
    ):
        assert {ranges(kind)[name] for name in names} == {Range(low, high)}


@pytest.mark.parametrize(("kind", "name", "low", "high"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_numbers_are_accepted_up_to_their_bounds(kind: Any, name: str, low: float, high: float) -> None:
    for value in (low, high):
        result = made(kind, name, value)
        assert result == value or set(result) == {value}
    beyond: list[Any] = [-1e39, 1e39, -math.inf, math.inf, math.nan, 10**400, 10**5000, True, "3", 3j]
    beyond += [low - 1, high + 1, math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
    for value in beyond:
        with pytest.raises(ConfigError, match=rf"{name} must be (an integer|a number) from"):
            made(kind, name, value)


# ------------------------------------------------------------------ bounds of several fields together


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"view1.size": 8192, "view2.size": 8192}, 2**32 // (8192**2 * 4)),
        ({"data.prefetch": 64, "view1.size": 1024, "view2.size": 1024}, 2**32 // (1024**2 * 66)),
        ({"grad_accum_steps": 400}, 2**32 // (224**2 * 403)),
        ({"num_local_views": 16}, 2**33 // ((2 * 224**2 + 16 * 96**2) * 4)),
        ({"view1.size": 2048}, 2**33 // ((2048**2 + 224**2) * 4)),
    ],
)
def test_batches_in_memory_are_bounded(changes: dict[str, object], largest: int) -> None:
    assert configs.replace(Config(batch_size=2), {**changes, "batch_size": largest}).batch_size == largest
    with pytest.raises(ConfigError, match=f"batch_size must leave .* {largest:,} images a batch, got {largest + 1};"):
        configs.replace(Config(batch_size=2), {**changes, "batch_size": largest + 1})


def test_pairs_are_in_order() -> None:
    for name in ("scale", "ratio", "blur_sigma"):
        with pytest.raises(ConfigError, match=f"view.{name} must be the smallest and the largest value, got"):
            configs.replace(ViewConfig(), {name: (0.5, 0.2)})


# ------------------------------------------------------------------ types


def test_numbers_of_arrays_and_lists_become_python_values() -> None:
    config = Config(
        epochs=np.int64(3),  # type: ignore[arg-type]
        timeout_minutes=np.float32(0.5),  # type: ignore[arg-type]
        channels_last=np.bool_(False),  # type: ignore[arg-type]
        log=["wandb"],  # type: ignore[arg-type]
        out="runs/x",  # type: ignore[arg-type]
        data=DataConfig(root="images"),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1, warmup_steps=torch.tensor(7)),  # type: ignore[arg-type]
        model=ModelConfig(mean=np.array([0.5, 0.25, 1]), std=[1, 1, 2]),  # type: ignore[arg-type]
    )
    values = (config.epochs, config.timeout_minutes, config.channels_last, config.optim.lr, config.optim.warmup_steps)
    assert [(type(v), v) for v in values] == [(int, 3), (float, 0.5), (bool, False), (float, 1.0), (int, 7)]
    assert config.log == ("wandb",)
    assert (config.out, config.data.root) == (Path("runs/x"), Path("images"))
    assert Config(out=Path("~/runs")).out == Path.home() / "runs"
    assert (config.model.mean, config.model.std) == ((0.5, 0.25, 1.0), (1.0, 1.0, 2.0))
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Config, {"epochs": 3.0}, "epochs must be an integer from 1 to 1,000,000, got 3.0"),
        (Config, {"seed": 10**5000}, "seed must be an integer from 0 to 2,147,483,647, got a number of too many"),
        (Config, {"name": 5}, "name must be text, got 5"),
        (Config, {"optim": {"lr": 1}}, r"optim must be of type OptimConfig, got \{'lr': 1\}"),
        (Config, {"mode": ["graph"]}, "mode must be one of auto, eager, compile, graph, got"),
        (Config, {"out": None}, "out must be a path, got None"),
        (Config, {"log": "wandb"}, "log must be a tuple of at most 10,000 values, got 'wandb'"),
        (
            Config,
            {"log": ("wanbd",)},
            "log must be one of tensorboard, wandb, mlflow, got 'wanbd'; did you mean 'wandb'",
        ),
        (Config, {"log": ("wandb", "wandb")}, "log must have no repeated names, got .* name each tracker once"),
        (DataConfig, {"prefetch": None}, "data.prefetch must be an integer from 1 to 64, got None"),
        (ModelConfig, {"last_bias": 1}, "model.last_bias must be True or False, got 1"),
        (ModelConfig, {"hidden_bias": 0}, "model.hidden_bias must be True or False, got 0"),
        (ModelConfig, {"std": (1.0,)}, r"model.std must be a tuple of 3 values, got \(1.0,\)"),
        (ModelConfig, {"std": (0, 0, 0)}, "model.std must be a number from 0.001 to 1000, got 0"),
        (ViewConfig, {"scale": 0.5}, "view.scale must be a tuple of 2 values, got 0.5"),
        (LinearSettings, {"l2": ()}, "eval: l2 must be one or more values"),
        (FinetuneSettings, {"labels": "1"}, "eval: labels must be a tuple of at most 10,000 values, got '1'"),
    ],
)
def test_values_of_other_types_are_refused(kind: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


# ------------------------------------------------------------------ choices and sizes in the Python API

IMAGES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
BOX = torch.tensor([[0, 0, 8, 8]])


def batches(**options: Any) -> Any:
    source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), None, (), "test")
    return next(eval_batches(source, Preprocessing(crop=8), **({"batch_size": 2} | options)))


def byol(**options: Any) -> Any:
    return BYOL("resnet18_narrow", **options)


def simsiam(**options: Any) -> Any:
    return SimSiam("resnet18_narrow", **options)


def schedule(**options: Any) -> Any:
    return RunSchedule(total_steps=9, base_lr=0.2, tau_base=0.99, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: byol(view_batching="batchd"), "BYOL: view_batching must be one of .*; did you mean 'batched'"),
        (lambda: simsiam(view_batching="concated"), "SimSiam: view_batching must .* 'concat'"),
        (lambda: schedule(lr_schedule="linear"), "lr_schedule must be one of"),
        (lambda: schedule(tau_schedule="const"), "tau_schedule must be one"),
        (lambda: resolve_device("gpu"), "device must be one of auto, cpu, cuda, got 'gpu'"),
        (lambda: resolve_precision("fp8", torch.device("cpu")), "precision must be one of .*, got 'fp8'"),
        (lambda: Preprocessing(crop=8, interpolation="cubic"), "interpolation must be one of bicubic, .*, got 'cubic'"),  # type: ignore[arg-type]
        (lambda: Preprocessing(crop=8, resize=7), r"resize must be at least preprocessing.crop \(8\), got 7"),
        (lambda: Preprocessing(crop=8, antialias=False), "antialias must be True, got False"),
        (lambda: Preprocessing(crop=8, value_range=(0, 255)), "value_range must be a number from 1 to 1, got 255"),
        (lambda: Preprocessing(crop=8, crop_mode="top"), "crop_mode must be one of center, got 'top'"),  # type: ignore[arg-type]
        (lambda: batches(loader="pil"), "loader must be one of"),
        (lambda: batches(on_corrupt="ignore"), "on_corrupt must be one of raise, skip, got 'ignore'"),
        (lambda: roofline(recipes.demo(), dtype="fp32").floor(stated("H100"), "A", schedule="max"), "schedule must be"),  # type: ignore[arg-type]
        (lambda: export_as(torch.nn.Identity(), {}, "onxx", Path()), "format must be one of .*, got 'onxx'"),
        (lambda: resized_crop(IMAGES, BOX, 8, interpolation="area"), "interpolation must be bicubic or bilinear"),  # type: ignore[arg-type]
        (lambda: byol(hidden_dim=2**31), "BYOL: hidden_dim must be an integer from 1 to 65,536, got 2147483648"),
        (lambda: byol(projection_dim=64.0), "BYOL: projection_dim must be an integer from 1 to 65,536, got 64.0"),
        (lambda: byol(projector_layers=0), "BYOL: projector_layers must be an integer from 1 to 8, got 0"),
        (lambda: byol(image_size=10**5), "BYOL: image_size must be an integer from 1 to 8,192, got 100000"),
        (lambda: simsiam(predictor_hidden_dim=0), "SimSiam: predictor_hidden_dim must be"),
        (lambda: Normalize((0.5,) * 3, (0.5, 0.0, 0.5)), "normalize: std must be a number from 0.001 to 1000, got 0"),
        (lambda: Normalize((math.nan,) * 3, (1.0,) * 3), "normalize: mean must be a number from -10 to 10, got nan"),
        (lambda: batches(batch_size=0), "batch_size must be an integer from 1 to 65,536, got 0"),
        (lambda: batches(threads=-1), "threads must be an integer from 0 to 1,024, got -1"),
        (lambda: TrainStep(None, None, None, grad_accum_steps=0), "grad_accum_steps must be an integer from 1"),  # type: ignore[arg-type]
    ],
)
def test_wrong_choices_and_sizes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_number_without_range_is_an_error_of_the_program() -> None:
    with pytest.raises(AssertionError, match="x is a number without a Range"):
        check("x", int, 3)


def test_threads_that_do_not_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have started must not wait for the others forever."""
    import threading

    start, num_started = threading.Thread.start, 0

    def start_three(thread: threading.Thread) -> None:
        nonlocal num_started
        if num_started == 3:
            raise RuntimeError("can't start new thread")
        num_started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_three)
    with pytest.raises(ConfigError, match="data.threads must be as many as the system can start, got 5"):
        single_core_threads(5, "test")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("test")]
