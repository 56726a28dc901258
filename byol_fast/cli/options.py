"""Shared by the commands: error output, and configurations from options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from byol_fast import config as configs
from byol_fast.cli.help import help_text
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.config.fields import ImageSize, check
from byol_fast.config.resnets import RESNET_OPTIONS
from byol_fast.utils.output import PlainConsole

T = TypeVar("T")

FREQUENT = (
    "folder",
    "model.encoder",
    "init_from",
    "image_size",
    "batch_size",
    "epochs",
    "optim.lr",
    "knn.val_root",
    "name",
    "device",
)
"""Options of a run that are changed most often."""


def print_error(message: str, code: int) -> int:
    """Print an error to standard error and return the exit code."""
    PlainConsole(stderr=True).print(message, soft_wrap=True, style="red")
    return code


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run: its configuration, and short forms of what is set most often."""

    folder: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER")] = ()
    """Images to train on: short for --data.root."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Height and width of the global views in pixels: short for --view1.size and --view2.size."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Configuration of the run."""

    def resolve(self, argv: Sequence[str], prog: str) -> Config:
        """The configuration with the folder filled in, and without options that its encoder has no place for.

        Args:
            argv: the words that these options were parsed from.
            prog: the command, for error messages.

        Raises:
            ConfigError: a folder beside `--data.root`, several folders, or an option that the encoder has no place for
                among the words.
        """
        config = self.config
        if self.folder:
            config = configs.replace(config, {"data.root": Path(one_folder(self.folder, argv, prog))})
        given = {name for name in (f"model.{name}" for name in RESNET_OPTIONS) if is_given(f"--{name}", argv)}
        return recipes.drop_resnet_options(config, given)


def find_recipe(name: str, command: str, *, images: str = "{}") -> Config:
    """The configuration of the recipe that a command begins with.

    Args:
        name: of the recipe.
        command: as in `byol-fast train`.
        images: words that give it the path `{}` of images; empty if it takes none.

    Raises:
        ConfigError: there is no such recipe, or the word is the path of images.
    """
    if name not in recipes.RECIPES and Path(name).exists():
        usage = f"{command} RECIPE {images.format(name)}".rstrip()
        raise ConfigError(f"{command}: {name} is not a recipe; it comes first: {usage}")
    return recipes.get(name)


def parse_config(config: Config, argv: list[str], prog: str) -> Config:
    """Override single fields of a configuration from the command line."""
    return parse(RunOptions, argv, prog, RunOptions(config=config)).resolve(argv, prog)


def parse(options: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Options of a command from its words; prints the help and exits if they ask for it.

    Args:
        options: dataclass whose fields are the options.
        argv: the words behind the command.
        prog: the command.
        default: instance with the default values; commands with options of a run have one, with a recipe.

    Raises:
        ConfigError: `--image-size` beside the size of a view or out of range, or an invalid value of a configuration.
    """
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(options, prog, default=default, first=FREQUENT), end="")
        sys.exit(0)
    given = [name for name in ("--view1.size", "--view2.size") if is_given(name, argv)]
    if given and is_given("--image-size", argv):
        raise ConfigError(
            f"{prog}: --image-size must not be given beside {given[0]}, it sets the size of both views; drop one"
        )
    if default is None:
        return tyro.cli(options, args=argv, prog=prog)
    try:
        size = int(last_value("--image-size", argv) or "")
    except ValueError:  # not given, or no number, which the parser refuses
        size = None
    if size is not None:  # set here, before the views are made and checked against each other
        check("image_size", ImageSize, size)
        argv = [*argv, "--view1.size", f"{size}", "--view2.size", f"{size}"]
    return tyro.cli(options, args=argv, prog=prog, default=default)


def one_folder(folders: Sequence[str], argv: Sequence[str], prog: str) -> str:
    """The folder that a command was given in place of `--data.root`.

    Raises:
        ConfigError: there are several, or `--data.root`, too.
    """
    if len(folders) > 1:
        raise ConfigError(
            f"{prog}: FOLDER must be one path, got {len(folders)}: {' '.join(folders[:3])}; name the folder that holds "
            "them, or quote the pattern of shards"
        )
    if is_given("--data.root", argv):
        raise ConfigError(f"{prog}: FOLDER must not be given beside --data.root, got {folders[0]}; drop one of them")
    if not folders[0]:
        raise ConfigError(f"{prog}: FOLDER must be a path, got an empty word; give the folder of images")
    return folders[0]


def is_given(option: str, argv: Sequence[str]) -> bool:
    """True if an option is among the words of a command."""
    return any(word.partition("=")[0].replace("_", "-") == option.replace("_", "-") for word in argv)


def last_value(option: str, argv: Sequence[str]) -> str | None:
    """The value that an option was given last among the words of a command; None if it is not among them."""
    last = None
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, joined, value = word.partition("=")
        if name.replace("_", "-") == option:
            last = value if joined else following
    return last
