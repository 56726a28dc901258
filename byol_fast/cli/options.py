"""Shared by the commands: error output, and configurations from options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.utils.output import PlainConsole

T = TypeVar("T")


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
    """Height and width of both views in pixels: short for --view1.size and --view2.size."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Configuration of the run."""

    def resolve(self, argv: Sequence[str], prog: str) -> Config:
        """The configuration with the short forms filled in.

        Args:
            argv: the words that these options were parsed from.
            prog: the command, for error messages.

        Raises:
            ConfigError: a folder beside `--data.root`, several folders, or a size out of range.
        """
        config = self.config
        if self.folder:
            config = configs.replace(config, {"data.root": Path(one_folder(self.folder, argv, prog))})
        return config if self.image_size is None else configs.with_image_size(config, self.image_size)


def parse_config(config: Config, argv: list[str], prog: str) -> Config:
    """Override single fields of a configuration from the command line."""
    return parse(RunOptions(config=config), argv, prog).resolve(argv, prog)


def parse(default: T, argv: Sequence[str], prog: str) -> T:
    """Options of a command from its words.

    Args:
        default: dataclass with the default values.
        argv: the words behind the command.
        prog: the command.

    Raises:
        ConfigError: `--image-size` beside the size of a view, or an invalid value of a configuration.
    """
    given = [name for name in ("--view1.size", "--view2.size") if is_given(name, argv)]
    if given and is_given("--image-size", argv):
        raise ConfigError(
            f"{prog}: --image-size must not be given beside {given[0]}, it sets the size of both views; drop one"
        )
    return tyro.cli(type(default), default=default, args=argv, prog=prog, description=f"Options of `{prog}`.")


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
    return any(word.partition("=")[0].replace("_", "-") == option for word in argv)
