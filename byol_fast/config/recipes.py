"""Recipes: published settings by name, each a function that returns a complete `Config`."""

from __future__ import annotations

from collections.abc import Callable, Collection

from byol_fast.config.fields import ConfigError, require, suggestion
from byol_fast.config.io import replace
from byol_fast.config.resnets import RESNET_OPTIONS, is_resnet
from byol_fast.config.schema import (
    Config,
    DataConfig,
    KNNConfig,
    ModelConfig,
    OptimConfig,
    TauConfig,
)
from byol_fast.config.views import ViewConfig

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def _local_view(view: ViewConfig, size: int) -> ViewConfig:
    """The local views that belong to a recipe's own view: small crops, else augmented like it."""
    return replace(view, {"size": size, "scale": (0.05, 0.25)})


DEMO_GPU_EPOCHS = 40
"""Epochs of the demo on a GPU: a few minutes."""


def demo() -> Config:
    """Packaged Fashion-MNIST, ResNet-18 of half the width: about three minutes on two CPU cores.

    Size, crops, batch size, learning rate, tau, jitter and blur are the best for that time in a search on held-out
    training images (`benchmarks/demo_search.py`).
    """
    view = ViewConfig(size=24, scale=(0.2, 1.0), saturation=0.0, hue=0.0, grayscale_p=0.0, blur_p=0.0)
    # From 17 px on the input of the last stage has more than one pixel: of one, oneDNN's bf16 convolution with stride 2
    # returns wrong gradients of its weights (torch 2.15). Eager training does not use it there, a compiled one does.
    return Config(
        recipe="demo",
        epochs=11,
        batch_size=64,
        data=DataConfig(builtin="demo"),
        view1=view,
        view2=view,
        local_view=_local_view(view, 18),
        model=ModelConfig(
            encoder="resnet18_narrow", hidden_dim=512, projection_dim=128, mean=(0.286,) * 3, std=(0.353,) * 3
        ),
        optim=OptimConfig(name="sgd", lr=0.1, weight_decay=5e-4, warmup_epochs=0.2),
        tau=TauConfig(base=0.95),
        knn=KNNConfig(every_epochs=11, max_train=0, max_val=0),
    )


def cifar10_resnet18() -> Config:
    """CIFAR-10, ResNet-18 with the 3x3 stem, 1000 epochs: solo-learn's settings (its linear accuracy: 92.6 %).

    solo-learn's LARS clips the adaptation at the learning rate; ours, as the reference, does not.
    """
    view = ViewConfig(size=32, blur_p=0.0)
    return Config(
        recipe="cifar10_resnet18",
        epochs=1000,
        batch_size=256,
        data=DataConfig(builtin="cifar10"),
        view1=view,
        view2=ViewConfig(size=32, blur_p=0.0, solarize_p=0.2),
        local_view=_local_view(view, 16),
        model=ModelConfig(encoder="resnet18", cifar_stem=True, mean=CIFAR_MEAN, std=CIFAR_STD),
        optim=OptimConfig(name="lars", lr=1.0, weight_decay=1e-5, trust_coefficient=0.02),
        tau=TauConfig(base=0.99),
        knn=KNNConfig(k=200, temperature=0.1),
    )


def cifar10_lightly() -> Config:
    """CIFAR-10, lightly's benchmark: ResNet-18, SGD, constant tau, 200 epochs (its kNN-200 accuracy: 86.8 %).

    Source: lightly, `docs/source/getting_started/benchmarks/cifar10_benchmark.py`; its table of 2023, one RTX A6000: at
    batch size 512 86.8 % after 200 epochs (108.3 min) and 91.0 % after 800 (400.9 min), at 128 86.9 % after 200 (121.9
    min). These are the best of the accuracies on the test images after every epoch; ours is that after the last step.
    When the table was made, the script had SimCLR's views: saturation 0.4, and no solarization. It has these ones since
    July 2023, and no newer table.

    Its loss is ours / 4 - 1, so that with SGD a quarter of its learning rate (0.06 for a batch of 128) and four times
    its weight decay (5e-4) give the same weights. It updates the target before the forward pass: the target begins as a
    copy, so that every forward pass sees the same target as here. It ran with PyTorch's defaults: TF32 in convolutions
    on a GPU, and fp32 in the heads, where `tf32` is TF32, too. On a CPU `tf32` is fp32.
    """
    view = ViewConfig(size=32, interpolation="bilinear", blur_p=0.0)
    return Config(
        recipe="cifar10_lightly",
        epochs=200,
        batch_size=512,
        precision="tf32",
        data=DataConfig(builtin="cifar10"),
        view1=view,
        view2=replace(view, {"solarize_p": 0.2}),
        local_view=_local_view(view, 16),
        model=ModelConfig(
            encoder="resnet18_lightly",
            cifar_stem=True,
            hidden_dim=1024,
            projection_dim=256,
            hidden_bias=False,
            last_bias=True,
        ),
        optim=OptimConfig(
            name="sgd",
            lr=0.03,
            lr_interval="epoch",
            warmup_epochs=0,
            weight_decay=2e-3,
            decay_1d=True,
        ),
        tau=TauConfig(base=0.99, schedule="constant"),
        knn=KNNConfig(k=200, temperature=0.1, full_at_end=True),
    )


def cifar10_fast() -> Config:
    """CIFAR-10, ResNet-18 with the 3x3 stem, 200 epochs in bf16: our choices for a fast kNN accuracy, not tuned.

    From published settings, not tuned and not measured on a GPU:

    - optimizer: lightly's, see `cifar10_lightly` (its accuracies with batches of 128 and 512 are equal, and 512 is
      faster), with the paper's warm-up and cosine by step, and without decay of biases and norms;
    - views: SimSiam's on CIFAR-10, with milder crops than the paper's and without solarization (as lightly's, when its
      table was made);
    - tau: the reference's for 100 epochs, with its cosine to 1;
    - heads: the paper's, about 1 % of the encoder's multiplications.
    """
    view = ViewConfig(size=32, scale=(0.2, 1.0), interpolation="bilinear", saturation=0.4, blur_p=0.0, solarize_p=0.0)
    return Config(
        recipe="cifar10_fast",
        epochs=200,
        batch_size=512,
        precision="bf16",
        data=DataConfig(builtin="cifar10"),
        view1=view,
        view2=view,
        local_view=_local_view(view, 16),
        model=ModelConfig(encoder="resnet18", cifar_stem=True, mean=CIFAR_MEAN, std=CIFAR_STD),
        optim=OptimConfig(name="sgd", lr=0.03, weight_decay=2e-3),
        tau=TauConfig(base=0.99),
        knn=KNNConfig(k=200, temperature=0.1),
    )


IMAGENET_PRESETS = {
    40: (0.45, 1e-6, 0.97),
    100: (0.45, 1e-6, 0.99),
    300: (0.3, 1e-6, 0.99),
    1000: (0.2, 1.5e-6, 0.996),
}
"""Base learning rate, weight decay and base tau by epochs (deepmind-research `byol/configs/byol.py`)."""


def imagenet_resnet50(epochs: int = 1000) -> Config:
    """ImageNet, ResNet-50: the reference's settings (linear accuracy after 1000 epochs at batch size 4096: 74.3 %).

    Args:
        epochs: 40, 100, 300 or 1000; they differ in learning rate, weight decay and tau.

    Raises:
        ConfigError: the reference has no settings for that many epochs.
    """
    if epochs not in IMAGENET_PRESETS:
        raise ConfigError(
            f"imagenet_resnet50: epochs must be one of {', '.join(map(str, IMAGENET_PRESETS))}, got {epochs}; "
            "start from the nearest and override `epochs`"
        )
    lr, weight_decay, tau = IMAGENET_PRESETS[epochs]
    return Config(
        recipe="imagenet_resnet50" if epochs == 1000 else f"imagenet_resnet50_{epochs}",
        epochs=epochs,
        batch_size=256,
        model=ModelConfig(encoder="resnet50", zero_init_residual=True),
        optim=OptimConfig(name="lars", lr=lr, weight_decay=weight_decay),
        tau=TauConfig(base=tau),
    )


def seed_guide() -> Config:
    """A practical guide's settings: CIFAR-10 at 224 px, ResNet-18, small heads, Adam, constant tau."""
    view = ViewConfig(
        scale=(0.2, 1.0),
        interpolation="bilinear",
        color_jitter_p=1.0,
        saturation=0.4,
        blur_p=1.0,
        blur_kernel=3,
        solarize_p=0.0,
    )
    return Config(
        recipe="seed_guide",
        epochs=10,
        batch_size=256,
        data=DataConfig(builtin="cifar10"),
        view1=view,
        view2=view,
        local_view=_local_view(view, 96),
        model=ModelConfig(
            encoder="resnet18", hidden_dim=256, projection_dim=256, last_bias=True, mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        optim=OptimConfig(name="adam", lr=1e-3, scale_lr=False, schedule="constant", warmup_epochs=0, weight_decay=0.0),
        tau=TauConfig(base=0.996, schedule="constant"),
    )


def five_steps() -> Config:
    """Large views of few images: ResNet-50 at 512 px, mild crops, no blur."""
    view = ViewConfig(size=512, scale=(0.3, 1.0), saturation=0.4, blur_p=0.0)
    return Config(
        recipe="five_steps",
        epochs=100,
        batch_size=32,
        view1=view,
        view2=view,
        local_view=_local_view(view, 224),
        model=ModelConfig(encoder="resnet50"),
        optim=OptimConfig(name="lars", lr=0.45, weight_decay=1e-6),
        tau=TauConfig(base=0.99),
    )


def simsiam_imagenet() -> Config:
    """SimSiam, ImageNet, ResNet-50, 100 epochs: the paper's settings (linear accuracy at batch size 512: 68.1 %)."""
    view = ViewConfig(scale=(0.2, 1.0), interpolation="bilinear", saturation=0.4, blur_p=0.5, solarize_p=0.0)
    return Config(
        recipe="simsiam_imagenet",
        method="simsiam",
        epochs=100,
        batch_size=256,
        view1=view,
        view2=view,
        model=ModelConfig(
            encoder="resnet50",
            zero_init_residual=True,
            hidden_dim=2048,
            projection_dim=2048,
            projector_layers=3,
            predictor_hidden_dim=512,
        ),
        optim=OptimConfig(
            name="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0, decay_1d=True, constant_predictor_lr=True
        ),
    )


def simsiam_cifar10() -> Config:
    """SimSiam, CIFAR-10, ResNet-18 with the 3x3 stem, 800 epochs: the paper's settings (linear accuracy: 91.8 %)."""
    view = ViewConfig(size=32, scale=(0.2, 1.0), interpolation="bilinear", saturation=0.4, blur_p=0.0, solarize_p=0.0)
    return Config(
        recipe="simsiam_cifar10",
        method="simsiam",
        epochs=800,
        batch_size=512,
        data=DataConfig(builtin="cifar10"),
        view1=view,
        view2=view,
        model=ModelConfig(
            encoder="resnet18",
            cifar_stem=True,
            hidden_dim=2048,
            projection_dim=2048,
            projector_layers=2,
            predictor_hidden_dim=512,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
        ),
        optim=OptimConfig(
            name="sgd", lr=0.03, weight_decay=5e-4, warmup_epochs=0, decay_1d=True, constant_predictor_lr=True
        ),
        knn=KNNConfig(k=200, temperature=0.1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "cifar10_resnet18": cifar10_resnet18,
    "cifar10_lightly": cifar10_lightly,
    "cifar10_fast": cifar10_fast,
    "imagenet_resnet50": imagenet_resnet50,
    "imagenet_resnet50_300": lambda: imagenet_resnet50(300),
    "imagenet_resnet50_100": lambda: imagenet_resnet50(100),
    "imagenet_resnet50_40": lambda: imagenet_resnet50(40),
    "seed_guide": seed_guide,
    "five_steps": five_steps,
    "simsiam_imagenet": simsiam_imagenet,
    "simsiam_cifar10": simsiam_cifar10,
}


def get(name: str) -> Config:
    """Configuration of a recipe.

    Raises:
        ConfigError: unknown name; the closest one is suggested.
    """
    require(name in RECIPES, "recipe:", f"be one of {', '.join(RECIPES)}", name, suggestion(name, RECIPES))
    return RECIPES[name]()


def drop_resnet_options(config: Config, given: Collection[str]) -> Config:
    """A configuration without the options that its recipe sets for a ResNet, if another encoder was chosen.

    Args:
        config: with the user's changes.
        given: fields that the user has set, such as `model.cifar_stem`.

    Raises:
        ConfigError: the user has set one of these options for an encoder that has no place for it.
    """
    encoder = config.model.encoder
    options = [] if is_resnet(encoder) else [name for name in RESNET_OPTIONS if getattr(config.model, name)]
    for name in options:
        if f"model.{name}" in given:
            raise ConfigError(
                f"config: model.{name} must be False with the encoder {encoder!r}, got True; it is for torchvision's "
                "ResNets, leave it out"
            )
    return replace(config, {f"model.{name}": False for name in options})


def dropped_resnet_options(config: Config) -> list[str]:
    """Names of the options that the recipe of a configuration sets, and that its encoder has no place for."""
    if is_resnet(config.model.encoder) or config.recipe not in RECIPES:
        return []
    recipe = RECIPES[config.recipe]().model
    return [name for name in RESNET_OPTIONS if getattr(recipe, name) and not getattr(config.model, name)]
