"""Builds the parts of a training run from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.config.fields import expand_home, require
from byol_fast.data import ImageSource, open_train_val
from byol_fast.data.loaders.factory import make_loader
from byol_fast.data.sampler import BatchSampler
from byol_fast.models import split_batchnorm
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.base import SSLModel
from byol_fast.models.builder import build_model
from byol_fast.models.encoders import check_encoder_name
from byol_fast.optim import RunSchedule, build_optimizer
from byol_fast.training import distributed
from byol_fast.training.distributed import World
from byol_fast.training.init_from import InitialWeights, read_initial_weights
from byol_fast.training.init_source import with_absolute_source
from byol_fast.training.knn_monitor import KNNMonitor, check_labels, knn_problem
from byol_fast.training.locks import RunLock, exclusive
from byol_fast.training.memory import check_memory
from byol_fast.training.mode import Mode, compile_forward, resolve_mode
from byol_fast.training.online_probe import MAX_WEIGHTS, OnlineProbe
from byol_fast.training.preflight import check_start
from byol_fast.training.restore import restore_latest
from byol_fast.training.run_dir import RunDir, open_run_dir
from byol_fast.training.schedule import build_schedule
from byol_fast.training.state import TrainState, set_rng_state, whole_steps_in
from byol_fast.training.train_step import TrainStep
from byol_fast.utils import cpu_tuning, env, progress
from byol_fast.utils.device import resolve_device
from byol_fast.utils.precision import Precision, resolve_precision


@dataclass(frozen=True, slots=True)
class Execution:
    """Processes, device, precision and mode of a run."""

    world: World
    device: torch.device
    precision: Precision
    mode: Mode
    cudnn_benchmark: bool

    def apply_to_backends(self) -> None:
        """Set torch's switches for the whole process."""
        self.precision.apply_to_backends()
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


@dataclass(frozen=True, slots=True)
class TrainerComponents:
    """The parts of a run, ready to train."""

    config: Config
    execution: Execution
    run_dir: RunDir
    lock: RunLock | None
    """Lock of the run directory; None on other ranks than 0."""
    checkpoint: Path | None
    """Checkpoint that the run was resumed from; None for a new run, also for one that extends another."""
    environment: dict[str, Any]
    """Machine, versions and execution mode, as in `environment.json`."""
    train_source: ImageSource
    train_step: TrainStep
    state: TrainState
    knn: KNNMonitor | None
    total_steps: int
    notes: tuple[str, ...]
    """Lines for the startup summary."""
    rng_state: dict[str, Tensor]
    """Random number generators at the end of the building."""

    @property
    def first_metrics(self) -> Path:
        """Metrics file with the records that the run begins with: its own, or that of the run that it extends."""
        extended = self.config.extend if self.checkpoint is None else None
        return (self.run_dir if extended is None else RunDir(extended)).metrics

    def restore_global_state(self) -> None:
        """Set random number generators and torch's switches, which another run of this process may have changed."""
        self.execution.apply_to_backends()
        set_rng_state(self.rng_state)


def build_components(config: Config, *, data: object, resume: Path | None) -> TrainerComponents:
    """Lock the run directory and build the parts of a run; with `resume`, load its newest checkpoint into them.

    A run with `config.extend` and without a checkpoint of its own begins with the last one of that run.

    Args:
        config: of the run.
        data: images instead of the configuration's, see `byol_fast.data.open_source`; None uses the configuration's.
        resume: run folder to continue.

    Raises:
        ConfigError: a field is invalid, or differs from the run to be resumed in what is computed; another process
            runs in the folder; the package of a tracker is missing.
        CheckpointError: `resume` holds no usable checkpoint.
        ValueError: the data is missing, empty or too small.
        RuntimeError: another run is being built or trained in this process.
    """
    where, fix = "Trainer: config", "take one from byol_fast.config.recipes, or call byol_fast.pretrain"
    require(isinstance(config, Config), where, "be a byol_fast.Config", config, fix)
    with exclusive():
        config, data = _with_absolute_paths(config, data)
        world = distributed.init_process_group(config.device, config.timeout_minutes)
        world.run_on_main(lambda: check_start(config, data=data, resume=resume))
        check_encoder_name(config.model.encoder)
        execution = _resolve_execution(config, world)
        run_dir, lock, notes = _open_run_dir(config, resume, world)
        shown = progress.of_run(is_main_process=world.is_main_process)
        try:
            with shown.shown(), shown.bar(None, "preparing the run"):
                return _build(config, data, execution, run_dir, lock, notes)
        except BaseException:
            if lock is not None:
                lock.release()
            raise


def _build(
    config: Config, data: object, execution: Execution, run_dir: RunDir, lock: RunLock | None, notes: list[str]
) -> TrainerComponents:
    """Build the parts of a run in its locked directory, which has checkpoints only if it is resumed."""
    world = execution.world
    if config.max_autotune:
        notes.append("max_autotune: kernels are tuned before the first step, for a ResNet-50 25-60 minutes")
    has_checkpoint = world.run_on_main(run_dir.has_checkpoints)
    environment = describe_environment(config, execution)

    # --- initial weights, data and model
    config, initial = _read_initial_weights(config, world, notes, has_checkpoint=has_checkpoint)
    with world.main_process_first():
        train_source, val_source, sampler = _open_images(config, data, world)
        total_steps = config.steps or whole_steps_in(config.epochs, sampler, config.grad_accum_steps)
        schedule = build_schedule(config, sampler, total_steps, global_batch_size(config, world), notes)
    notes += check_memory(config, train_source, execution.device, execution.precision, world)
    model = _build_model(config, initial, execution, notes)
    loader = make_loader(
        train_source,
        config,
        device=execution.device,
        shard_id=world.rank,
        num_shards=world.size,
        corrupt_list=run_dir.corrupt_images(world.rank),
    )

    # --- optimizer, step, state and evaluation
    train_step = _build_train_step(config, execution, model, schedule)
    probe = _build_probe(config, model, train_source, execution, notes)
    accumulated = config.grad_accum_steps
    state = TrainState(
        model, train_step.optimizer, loader, train_step.grad_scaler, world, grad_accum_steps=accumulated, probe=probe
    )
    knn = _build_knn_monitor(config, model, train_source, val_source, execution, probe, notes)
    checkpoint = None
    if has_checkpoint:
        config, checkpoint = restore_latest(state, run_dir, config, environment)
        train_step.on_weights_loaded()
    elif config.extend is not None:
        config, _ = restore_latest(state, RunDir(config.extend), config, environment, extends=True)
        train_step.on_weights_loaded()
    return TrainerComponents(
        config=config,
        execution=execution,
        run_dir=run_dir,
        lock=lock,
        checkpoint=checkpoint,
        environment=environment,
        train_source=train_source,
        train_step=train_step,
        state=state,
        knn=knn,
        total_steps=total_steps,
        notes=tuple(notes),
        rng_state=state.rng_state(),
    )


def _read_initial_weights(
    config: Config, world: World, notes: list[str], *, has_checkpoint: bool
) -> tuple[Config, InitialWeights | None]:
    """The weights that `init_from` names, and the configuration with their digest; a checkpoint replaces them."""
    if config.init_from and has_checkpoint:
        notes.append(f"init_from {config.init_from} is not read: the run goes on from its checkpoint")
    if has_checkpoint or config.extend is not None:
        return config, None
    with world.main_process_first():  # it may download them
        initial = read_initial_weights(config)
    if initial is None:
        return config, None
    notes.append(initial.summary())
    return configs.replace(config, {"init_sha256": initial.sha256}), initial


def _build_model(config: Config, initial: InitialWeights | None, execution: Execution, notes: list[str]) -> SSLModel:
    """The networks, on their device."""
    with execution.world.main_process_first():
        torch.manual_seed(config.seed)
        model = build_model(config)
    if initial is not None:
        initial.load_into(model)
    if dropped := recipes.dropped_resnet_options(config):
        notes.append(f"{' and '.join(dropped)} of the recipe {config.recipe} left out: only for torchvision's ResNets")
    if model.not_batched_reason is not None:
        notes.append(f"the views pass the networks one by one: {model.not_batched_reason}")
    _prepare_networks(model, config, execution)
    return model


def _open_images(config: Config, data: object, world: World) -> tuple[ImageSource, ImageSource | None, BatchSampler]:
    """Images, and their batches; errors about their number and labels come before the networks are built."""
    train_source, val_source = open_train_val(config, data)
    check_labels(config, train_source, val_source)
    sampler = BatchSampler(
        len(train_source),
        config.view_configs,
        batch_size=config.batch_size,
        seed=config.seed,
        shard_id=world.rank,
        num_shards=world.size,
    )
    return train_source, val_source, sampler


def _resolve_execution(config: Config, world: World) -> Execution:
    """Resolve device, precision and mode, and set torch's switches for the whole process."""
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    mode = resolve_mode(config, device, precision, world.size)
    execution = Execution(world, device, precision, mode, config.cudnn_benchmark)
    execution.apply_to_backends()
    return execution


def _open_run_dir(config: Config, resume: Path | None, world: World) -> tuple[RunDir, RunLock | None, list[str]]:
    """The run directory, its lock on the main process, and notes for the startup summary."""
    lock: RunLock | None = None

    def open_on_main() -> tuple[RunDir, str | None]:
        nonlocal lock
        run_dir, lock, note = open_run_dir(config, resume)
        return run_dir, note

    run_dir, note = world.run_on_main(open_on_main)
    return run_dir, lock, [] if note is None else [note]


def _build_train_step(config: Config, execution: Execution, model: SSLModel, schedule: RunSchedule) -> TrainStep:
    """Optimizer and step, to be compiled and captured in its first call if the mode asks for it."""
    single = execution.world.is_single
    forward = compile_forward(model, execution.mode, single_process=single, max_autotune=config.max_autotune)
    train_step = TrainStep(
        model,
        build_optimizer(config.optim, model.trainable_parameters(), list(model.online.predictor.parameters())),
        schedule,
        precision=execution.precision,
        forward=forward,
        grad_accum_steps=config.grad_accum_steps,
        channels_last=config.channels_last,
        all_reduce_found_inf=None if single else distributed.all_reduce_found_inf,
    )
    if execution.mode.name == "graph":
        train_step.use_cuda_graph()
    return train_step


def describe_environment(config: Config, execution: Execution) -> dict[str, Any]:
    """Machine, versions and execution mode: what bit-exact resuming depends on, as plain JSON values."""
    return env.describe(execution.device) | {
        "precision": execution.precision.name,
        "mode": execution.mode.name,
        "max_autotune": config.max_autotune,
        "cudnn_benchmark": config.cudnn_benchmark,
        "processes": execution.world.size,
    }


def _with_absolute_paths(config: Config, data: object) -> tuple[Config, object]:
    """Absolute paths of images, initial weights and the run to be extended: the run can be resumed from any folder."""
    config = with_absolute_source(config)
    if isinstance(data, str | Path):
        config, data = configs.replace(config, {"data.root": Path(data)}), None
    paths = {"data.root": config.data.root, "knn.val_root": config.knn.val_root, "extend": config.extend}
    absolute = {name: expand_home(path).absolute() for name, path in paths.items() if path is not None}
    return configs.replace(config, absolute), data


def _prepare_networks(model: SSLModel, config: Config, execution: Execution) -> None:
    """Move the networks to the device, then apply what the configuration and the processes ask of them."""
    device = execution.device
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        _tune_for_cpu(model, config, execution.mode)
    elif config.channels_last:
        from byol_fast.models import gpu_tuning  # imports torchvision's models, a second

        for network in model.networks():
            gpu_tuning.tune_for_gpu(network)
    if not execution.world.is_single:
        _setup_distributed(model, config, device, execution.world)
    if config.activation_checkpointing:
        checkpoint_blocks(model.encoder)


def _tune_for_cpu(model: SSLModel, config: Config, mode: Mode) -> None:
    """Measured to make CPU steps faster, see `benchmarks/NOTES.md`."""
    cpu_tuning.keep_freed_memory()
    if mode.name == "eager" and config.channels_last:
        for network in model.networks():
            cpu_tuning.use_small_map_convolutions(network)


def _setup_distributed(model: SSLModel, config: Config, device: torch.device, world: World) -> None:
    """Synchronize batch norms, wrap the online network in DDP, and give dropout another seed on each rank."""
    if config.sync_batchnorm:
        for network in model.networks():
            split_batchnorm.convert_sync_batchnorm(network)
    model.wrap_online(lambda network: distributed.wrap_ddp(network, device))
    torch.manual_seed(config.seed + world.rank)


def global_batch_size(config: Config, world: World) -> int:
    """Images per optimizer step, over all processes and accumulated batches."""
    return config.batch_size * config.grad_accum_steps * world.size


def _build_probe(
    config: Config, model: SSLModel, source: ImageSource, execution: Execution, notes: list[str]
) -> OnlineProbe | None:
    probe = config.probe
    if probe.enabled == "off" or source.labels is None:
        return None
    num_classes, most = len(source.classes), MAX_WEIGHTS // model.feature_dim
    if num_classes > most:
        problem = f"{num_classes:,} classes are more than it is trained for, {most:,}; are they numbers of the images?"
        if probe.enabled == "on":
            raise ConfigError(f"config: probe.enabled is 'on', but {problem} Set it to 'auto'")
        notes.append(f"no linear probe: {problem}")
        return None
    return OnlineProbe(
        model.feature_dim,
        num_classes,
        lr=probe.lr,
        device=execution.device,
        all_reduce_mean=None if execution.world.is_single else distributed.all_reduce_mean,
    )


def _build_knn_monitor(
    config: Config,
    model: SSLModel,
    train: ImageSource,
    val: ImageSource | None,
    execution: Execution,
    probe: OnlineProbe | None,
    notes: list[str],
) -> KNNMonitor | None:
    problem = knn_problem(config, train, val)
    if problem is not None:
        if config.knn.enabled == "auto" and (train.labels is not None or val is not None):
            notes.append(f"no kNN evaluation: {problem}")
        return None
    assert val is not None
    num_train = min(len(train), config.knn.max_train or len(train))
    if config.knn.k > num_train:
        notes.append(f"knn.k of {config.knn.k} cut to {num_train}, the number of training images to compare with")
    return KNNMonitor(
        config, model, train, val, device=execution.device, autocast=execution.precision.autocast_dtype, probe=probe
    )
