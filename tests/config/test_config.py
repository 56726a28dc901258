from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.nn import ReLU

from byol_fast import config as configs
from byol_fast.config import (
    Config,
    ConfigError,
    DataConfig,
    KNNConfig,
    ModelConfig,
    OptimConfig,
    TauConfig,
    ViewConfig,
    recipes,
)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = recipes.get(name)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    assert config.recipe == name


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ViewConfig(size=0), "view.size"),
        (lambda: ViewConfig(scale=(0.5, 0.2)), "view.scale"),
        (lambda: ViewConfig(ratio=(0.0, 1.0)), "view.ratio"),
        (lambda: ViewConfig(hflip_p=1.5), "view.hflip_p"),
        (lambda: ViewConfig(hue=0.6), "view.hue"),
        (lambda: ViewConfig(contrast=float("nan")), "view.contrast"),
        (lambda: ViewConfig(blur_kernel=4), "view.blur_kernel"),
        (lambda: ViewConfig(blur_sigma=(2.0, 0.1)), "view.blur_sigma"),
        (lambda: ViewConfig(solarize_threshold=300), "view.solarize_threshold"),
        (lambda: ViewConfig(interpolation="cubic"), "view.interpolation"),  # type: ignore[arg-type]
        (lambda: DataConfig(threads=-1), "data.threads"),
        (lambda: DataConfig(loader="pil"), "data.loader"),  # type: ignore[arg-type]
        (lambda: ModelConfig(hidden_dim=0), "model.hidden_dim"),
        (lambda: ModelConfig(std=(1.0, 0.0, 1.0)), "model.std"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr"),
        (lambda: OptimConfig(name="larc"), "optim.name"),  # type: ignore[arg-type]
        (lambda: OptimConfig(momentum=1.0), "optim.momentum"),
        (lambda: OptimConfig(warmup_steps=-1), "optim.warmup_steps"),
        (lambda: TauConfig(base=1.01), "tau.base"),
        (lambda: KNNConfig(k=0), "knn.k"),
        (lambda: KNNConfig(temperature=0.0), "knn.temperature"),
        (lambda: Config(batch_size=1), "batch_size"),
        (lambda: Config(seed=-1), "seed"),
        (lambda: Config(name="a/b"), "name"),
        (lambda: Config(view1=ViewConfig(size=32), model=ModelConfig(view_batching="concat")), "view2.size"),
        (lambda: Config(num_local_views=17), "num_local_views"),
        (lambda: Config(num_local_views=1, method="simsiam"), "num_local_views"),
        (lambda: Config(num_local_views=1, model=ModelConfig(view_batching="concat")), "num_local_views"),
        (lambda: Config(num_local_views=1, view1=ViewConfig(size=95)), "local_view.size"),
        (lambda: Config(num_local_views=1, view2=ViewConfig(size=95)), "local_view.size"),
        (lambda: Config(method="moco"), "method"),  # type: ignore[arg-type]
        (lambda: Config(mode="fast"), "mode"),  # type: ignore[arg-type]
        (lambda: Config(precision="fp8"), "precision"),  # type: ignore[arg-type]
        (lambda: Config(grad_accum_steps=0), "grad_accum_steps"),
        (lambda: Config(max_skipped_steps=0), "max_skipped_steps"),
        (lambda: Config(timeout_minutes=0.0), "timeout_minutes"),
        (lambda: ModelConfig(view_batching="stacked"), "model.view_batching"),  # type: ignore[arg-type]
        (lambda: ModelConfig(projector_layers=1), "model.projector_layers"),
        (lambda: ModelConfig(predictor_hidden_dim=0), "model.predictor_hidden_dim"),
        (lambda: Config(model=ModelConfig(predictor_hidden_dim=64)), "model.predictor_hidden_dim"),
        (lambda: Config(method="simsiam", model=ModelConfig(last_bias=True)), "model.last_bias"),
        (lambda: Config(method="simsiam", model=ModelConfig(hidden_bias=False)), "model.hidden_bias"),
        (lambda: OptimConfig(lr_interval="epochs"), "optim.lr_interval"),  # type: ignore[arg-type]
    ],
)
def test_bad_values_name_the_field(make: object, field: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=f"config: {field} must "):
        make()


def test_replace_reaches_nested_fields_in_both_notations() -> None:
    dotted = configs.replace(Config(), {"optim.lr": 0.5, "view1.scale": [0.2, 1], "batch_size": 8})
    nested = configs.replace(Config(), {"optim": {"lr": 0.5}, "view1": {"scale": (0.2, 1.0)}, "batch_size": 8})
    assert dotted == nested
    assert dotted.view1.scale == (0.2, 1.0)
    assert dotted.optim.trust_coefficient == Config().optim.trust_coefficient


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lrr": 1.0}, "OptimConfig has no field 'lrr'; did you mean 'lr'"),
        ({"tensorboard": True}, "Config has no field 'tensorboard'; fields are recipe, .* log,"),
        ({"batchsize": 1}, "did you mean 'batch_size'"),
        ({"lr": 0.1}, r"Config has no field 'lr'; did you mean optim=\{'lr': \.\.\.\} or probe=\{'lr': \.\.\.\}\?$"),
        ({"model": "resnet18"}, r"model must be a mapping .*, got 'resnet18'; .* model=\{'encoder': 'resnet50'\}"),
        ({"model.encoder": ReLU()}, r"encoder must be a model's name, got ReLU\(\); .* byol_fast\.BYOL\(module\)"),
        ({"batch_size": "8"}, "batch_size must be an integer from 2 to 65,536, got '8'"),
        ({"batch_size": True}, "batch_size must be an integer from .*, got True"),
        ({"view1.scale": [0.1]}, "view.scale must be a tuple of 2 values, got"),
        ({"seed.x": 1}, "seed is a single value"),
        ({"optim": {"name": "lion"}}, "optim.name must be one of lars, sgd, adam, adamw"),
        ({"model.mean": [0.5] * 10_000}, r"model.mean must be a tuple of 3 values, got \[0.5, .{190,} \.\.\.$"),
    ],
)
def test_replace_explains_what_it_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.replace(Config(), changes)


def test_load_explains_missing_and_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not exist; give the run folder"):
        configs.load(tmp_path / "config.json")
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(ConfigError, match="config: first/config.json does not exist; give the run folder"):
        configs.load(Path("first/config.json"))
    for text in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="not valid JSON"):
            configs.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"view1": {"size": 0}}')
    with pytest.raises(ConfigError, match=r"view.size must be .*, got 0 \(in .*config.json\)"):
        configs.load(tmp_path / "config.json")


@pytest.mark.parametrize(("tensorboard", "log"), [(True, ("tensorboard",)), (False, ())])
def test_run_of_an_earlier_version_is_read(tensorboard: bool, log: tuple[str, ...]) -> None:
    """It had one tracker, and evaluated on all validation images: it goes on so."""
    values = configs.to_dict(Config(epochs=7))
    for name in ("max_val", "full_at_end"):
        del values["knn"][name]
    del values["log"], values["memory_check"]
    config = configs.from_dict(values | {"tensorboard": tensorboard})
    assert config == configs.replace(Config(epochs=7), {"log": log, "knn.max_val": 0})


def test_differences_name_fields_with_both_values() -> None:
    other = configs.replace(Config(), {"optim.lr": 0.9, "seed": 3})
    assert configs.differences(Config(), other) == {"optim.lr": (0.2, 0.9), "seed": (0, 3)}


def test_local_views_differ_only_if_there_are_some() -> None:
    demo = recipes.demo()
    values = {name: value for name, value in configs.to_dict(demo).items() if "local" not in name}
    earlier = configs.from_dict(values)  # a run of before there were local views
    assert earlier.local_view != demo.local_view and configs.differences(earlier, demo) == {}
    with_locals = configs.replace(demo, {"num_local_views": 1})
    assert configs.differences(demo, with_locals) == {"num_local_views": (0, 1)}
    assert configs.differences(with_locals, configs.replace(with_locals, {"local_view.size": 16})) == {
        "local_view.size": (18, 16)
    }
    assert configs.differences(Config(), with_locals)["local_view.size"] == (96, 18)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_of_byol_has_local_views(name: str) -> None:
    config = recipes.get(name)
    if config.method == "simsiam":
        pytest.skip("its loss is of two views")
    config = configs.replace(config, {"num_local_views": 2})
    first, second, *local = config.view_configs
    assert (first, second, local) == (config.view1, config.view2, [config.local_view] * 2)
    assert config.local_view.size <= 0.75 * first.size and config.local_view.scale == (0.05, 0.25)
    augmentation = {"size": 224, "scale": (0.08, 1.0), "blur_p": 0.5, "solarize_p": 0.0}
    assert configs.replace(config.local_view, augmentation) == configs.replace(first, augmentation)


# ------------------------------------------------------------------ the published settings, restated


@pytest.mark.parametrize(
    ("epochs", "lr", "weight_decay", "tau"),
    [(40, 0.45, 1e-6, 0.97), (100, 0.45, 1e-6, 0.99), (300, 0.30, 1e-6, 0.99), (1000, 0.20, 1.5e-6, 0.996)],
)
def test_imagenet_recipes_are_the_references(epochs: int, lr: float, weight_decay: float, tau: float) -> None:
    config = recipes.imagenet_resnet50(epochs)
    assert (config.optim.lr, config.optim.weight_decay, config.tau.base) == (lr, weight_decay, tau)
    assert (config.optim.name, config.optim.trust_coefficient, config.optim.momentum) == ("lars", 1e-3, 0.9)
    assert (config.optim.warmup_epochs, config.epochs) == (10, epochs)
    assert (config.model.hidden_dim, config.model.projection_dim, config.model.last_bias) == (4096, 256, False)
    first, second = config.view1, config.view2
    assert (first.blur_p, first.solarize_p, second.blur_p, second.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    for view in (first, second):
        assert (view.scale, view.ratio, view.interpolation) == ((0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
        assert (view.hflip_p, view.color_jitter_p, view.grayscale_p) == (0.5, 0.8, 0.2)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.blur_kernel, view.blur_sigma, view.size) == (23, (0.1, 2.0), 224)


def test_imagenet_recipe_refuses_epochs_the_reference_has_no_settings_for() -> None:
    with pytest.raises(ConfigError, match="epochs must be one of 40, 100, 300, 1000, got 200"):
        recipes.imagenet_resnet50(200)


def test_cifar_recipe_is_solo_learns() -> None:
    config = recipes.cifar10_resnet18()
    assert (config.epochs, config.batch_size, config.model.encoder, config.model.cifar_stem) == (
        1000,
        256,
        "resnet18",
        True,
    )
    optim = config.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.trust_coefficient, config.tau.base) == (
        "lars",
        1.0,
        1e-5,
        0.02,
        0.99,
    )
    assert (config.view1.blur_p, config.view2.blur_p, config.view1.solarize_p, config.view2.solarize_p) == (
        0,
        0,
        0,
        0.2,
    )
    assert (config.view1.size, config.view1.scale) == (32, (0.08, 1.0))


def test_lightlys_recipe_is_its_benchmark() -> None:
    """The values of its script; `tests/compat/test_cifar10_lightly.py` compares with lightly itself."""
    config = recipes.cifar10_lightly()
    assert (config.epochs, config.batch_size, config.precision, config.data.builtin) == (200, 512, "tf32", "cifar10")
    optim, scale = config.optim, 4  # our loss is 4 times theirs plus 4
    assert (optim.name, optim.scale_lr, optim.schedule, optim.lr_interval) == ("sgd", True, "cosine", "epoch")
    assert scale * optim.lr * config.batch_size / 256 == pytest.approx(6e-2 * config.batch_size / 128)
    assert optim.weight_decay / scale == pytest.approx(5e-4)
    assert (optim.momentum, optim.decay_1d, optim.warmup_epochs, optim.constant_predictor_lr) == (0.9, True, 0, False)
    assert (config.tau.base, config.tau.schedule) == (0.99, "constant")
    assert (config.knn.k, config.knn.temperature, config.knn.full_at_end) == (200, 0.1, True)


def test_guide_recipes() -> None:
    guide = recipes.seed_guide()
    assert guide.view1 == guide.view2
    view = guide.view1
    assert (view.size, view.scale, view.color_jitter_p, view.blur_p, view.blur_kernel) == (224, (0.2, 1.0), 1.0, 1.0, 3)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (guide.tau.base, guide.tau.schedule, guide.optim.name, guide.optim.lr) == (0.996, "constant", "adam", 1e-3)
    assert (guide.model.hidden_dim, guide.model.projection_dim, guide.model.last_bias) == (256, 256, True)
    assert guide.model.mean == guide.model.std == (0.5, 0.5, 0.5)
    five = recipes.five_steps()
    assert (five.model.encoder, five.model.hidden_dim, five.model.projection_dim) == ("resnet50", 4096, 256)
    assert (five.view1.size, five.view1.scale, five.view1.color_jitter_p, five.view1.blur_p) == (
        512,
        (0.3, 1.0),
        0.8,
        0.0,
    )


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(ConfigError, match="got 'cifar10'; did you mean 'cifar10_resnet18'"):
        recipes.get("cifar10")
    with pytest.raises(ConfigError, match="did you mean 'imagenet_resnet50'"):
        recipes.get("imagenet_resnet5")


def test_simsiam_recipes_are_the_papers() -> None:
    """arXiv 2011.10566, sections 3 and appendices A and D."""
    imagenet, cifar = recipes.simsiam_imagenet(), recipes.simsiam_cifar10()
    for config, lr, decay, epochs, layers in ((imagenet, 0.05, 1e-4, 100, 3), (cifar, 0.03, 5e-4, 800, 2)):
        assert config.method == "simsiam"
        assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("sgd", lr, decay)
        assert (config.optim.momentum, config.optim.warmup_epochs, config.epochs) == (0.9, 0, epochs)
        assert config.optim.decay_1d
        assert config.optim.constant_predictor_lr
        heads = config.model.hidden_dim, config.model.projection_dim, config.model.predictor_hidden_dim
        assert heads == (2048, 2048, 512)
        assert config.model.projector_layers == layers
        assert config.view1 == config.view2
        assert config.view1.scale == (0.2, 1.0)
        assert (config.view1.saturation, config.view1.solarize_p) == (0.4, 0.0)
    assert (imagenet.view1.blur_p, cifar.view1.blur_p) == (0.5, 0.0)


def test_mode_is_chosen_with_a_reason_and_refused_with_one() -> None:
    import torch

    from byol_fast.training.mode import resolve_mode
    from byol_fast.utils.precision import Precision

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    bf16, fp16 = Precision("bf16", torch.bfloat16), Precision("fp16", torch.float16)
    assert resolve_mode(Config(), cpu, bf16).name == "eager"
    assert resolve_mode(Config(), gpu, bf16).name == "graph"
    for config, precision, processes, why in (
        (Config(), bf16, 8, "several processes"),
        (Config(grad_accum_steps=2), bf16, 1, "accumulated"),
        (Config(), fp16, 1, "fp16"),
    ):
        chosen = resolve_mode(config, gpu, precision, processes)
        assert chosen.name == "compile"
        assert why in chosen.reason
        with pytest.raises(ConfigError, match=f"mode 'graph' cannot serve this run: .*{why}"):
            resolve_mode(configs.replace(config, {"mode": "graph"}), gpu, precision, processes)
    assert resolve_mode(Config(activation_checkpointing=True), gpu, bf16).name == "eager"
    with pytest.raises(ConfigError, match="mode 'compile' cannot serve this run"):
        resolve_mode(Config(activation_checkpointing=True, mode="compile"), gpu, bf16)
    with pytest.raises(ConfigError, match="there is no GPU"):
        resolve_mode(Config(mode="graph"), cpu, bf16)
    with pytest.raises(ConfigError, match="max_autotune must be off in mode 'eager'"):
        resolve_mode(Config(max_autotune=True), cpu, bf16)
    assert resolve_mode(Config(max_autotune=True), gpu, bf16).name == "graph"


def test_kernels_are_tuned_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning takes the better part of an hour; it once came with mode graph."""
    import torch

    from byol_fast.models.byol import BYOL
    from byol_fast.training.mode import Mode, compile_forward

    asked: list[dict[str, object]] = []

    def compile_nothing(model: object, **options: object) -> object:
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = BYOL("resnet18_narrow", hidden_dim=8, projection_dim=8, image_size=32)
    for mode in (Mode("compile", "as asked"), Mode("graph", "as asked")):
        for max_autotune in (False, True):
            compile_forward(model, mode, max_autotune=max_autotune)
    assert [options["mode"] for options in asked] == [None, "max-autotune-no-cudagraphs"] * 2
