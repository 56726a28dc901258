"""Shared by the commands: error output, and configurations from options."""

from __future__ import annotations

import tyro

from byol_fast.config import Config
from byol_fast.utils.output import PlainConsole


def print_error(message: str, code: int) -> int:
    """Print an error to standard error and return the exit code."""
    PlainConsole(stderr=True).print(message, soft_wrap=True, style="red")
    return code


def parse_config(config: Config, argv: list[str], prog: str) -> Config:
    """Override single fields of a configuration from the command line."""
    return tyro.cli(Config, default=config, args=argv, prog=prog, description=f"Options of `{prog}`.")
