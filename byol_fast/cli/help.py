"""The text of `--help`: the options of a command by group, whole words wrapped to the width of the terminal."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

MIN_WIDTH, MAX_WIDTH = 40, 120
COLUMN = 30
"""Width of the names of options; a longer one has its text on the next line, as all have on a narrow terminal."""
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_UNPAIRED = get_args(tyro.conf.FlagCreatePairsOff[bool])[1]
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """An option, or a positional argument."""

    name: str
    """Dotted path of its field: `data.root`."""
    usage: str
    """`--data.root PATH`, `--fast, --no-fast`, or `FOLDER` for a positional argument."""
    text: str
    """Docstring of the field."""
    default: str
    """Default value; empty if there is none to show."""
    section: str = "options"
    """Heading that it is listed under."""

    @property
    def is_positional(self) -> bool:
        """True for a positional argument."""
        return not self.usage.startswith("-")


def help_text(
    options: Any, prog: str, *, default: Any = None, first: Sequence[str] = (), show_defaults: bool = True
) -> str:
    """Usage and options of a command.

    Args:
        options: dataclass whose fields are the options, as `tyro.cli` takes it.
        prog: the command.
        default: instance with the default values.
        first: names of the options that come first, in this order, if the command has all of them.
        show_defaults: show the default values.
    """
    listed = list(options_of(options, default))
    by_name = {option.name: option for option in listed}
    words = [option.usage for option in listed if option.is_positional]
    first = first if by_name.keys() >= set(first) else ()
    sections = {"changed most often": [by_name[name] for name in first]} if first else {}
    for option in [Option("help", "-h, --help", "Show this text.", ""), *listed]:
        if option.name not in first:
            section = "arguments" if option.is_positional else option.section
            sections.setdefault(section, []).append(option)
    width = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)
    description = " ".join((inspect.getdoc(get_origin(options) or options) or "").split())
    lines = [f"usage: {' '.join([prog, *words])} [--option value ...]", ""]
    lines += textwrap.wrap(description, width, break_long_words=False, break_on_hyphens=False)
    for section in sorted(sections, key=lambda section: section != "arguments"):
        lines += ["", section if ": " in section else f"{section}:"]
        for option in sections[section]:
            lines += _describe(option, width, show_default=show_defaults)
    return "\n".join(lines) + "\n"


def _describe(option: Option, width: int, *, show_default: bool) -> list[str]:
    text = f"{option.text} (default: {option.default})" if show_default and option.default else option.text
    is_wide = width >= 2 * COLUMN + 20
    usage, indent = f"  {option.usage}", " " * (COLUMN + 2 if is_wide else 6)
    is_short = is_wide and len(usage) <= COLUMN
    wrapped = textwrap.wrap(
        text,
        width,
        initial_indent=f"{usage:{COLUMN + 2}s}" if is_short else indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped if is_short else [usage, *wrapped]


# ---- fields of dataclasses -----------------------------------------------------------------------------------------


def options_of(options: Any, default: Any = None, prefix: str = "", section: str = "options") -> Iterator[Option]:
    """Options of a dataclass and of the dataclasses within.

    Args:
        options: the dataclass, also a generic one with its arguments.
        default: instance with the default values.
        prefix: of the names.
        section: heading of the options.
    """
    cls = get_origin(options) or options
    arguments = dict(zip(getattr(cls, "__parameters__", ()), get_args(options), strict=True))
    hints, texts = get_type_hints(cls, include_extras=True), _field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, *metadata = _split(hints[field.name])
        hint = arguments.get(hint, hint)
        settings = next((entry for entry in metadata if hasattr(entry, "metavar")), None)
        name = prefix + field.name
        value = _default(field) if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            values = None if value is dataclasses.MISSING else value
            if settings is not None and settings.name == "":
                yield from options_of(hint, values, prefix, section)
            else:
                yield from options_of(hint, values, f"{name}.", f"{name} options: {texts.get(field.name, '')}")
            continue
        metavar = settings.metavar if settings is not None and settings.metavar else _metavar(hint)
        if _POSITIONAL in metadata:
            is_many = get_origin(hint) is tuple
            word = metavar if settings is not None and settings.metavar else field.name.upper()
            usage = f"[{word} ...]" if is_many and word != metavar else f"[{word}]" if is_many else word
        else:
            usage = _flag(name, metavar, is_paired=_UNPAIRED not in metadata)
        yield Option(name, usage, texts.get(field.name, ""), _shown(value), section)


def _split(hint: Any) -> tuple[Any, ...]:
    """Type and metadata of a hint."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag(name: str, metavar: str, *, is_paired: bool) -> str:
    head, dot, last = name.replace("_", "-").rpartition(".")
    option = f"--{head}{dot}{last}"
    if metavar:
        return f"{option} {metavar}"
    return f"{option}, --{head}{dot}no-{last}" if is_paired else option


def _metavar(hint: Any) -> str:
    """Kind of value that an option takes; empty for a flag."""
    hint = _split(hint)[0]
    if get_origin(hint) in {Union, types.UnionType}:
        return _metavar(next(arg for arg in get_args(hint) if arg is not types.NoneType))
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        one = _metavar(kinds[0])
        return f"[{one} [{one} ...]]" if kinds[-1] is Ellipsis else " ".join(map(_metavar, kinds))
    return "" if hint is bool else _METAVARS[hint]


def _shown(value: Any) -> str:
    if value is None or value is dataclasses.MISSING:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, also of those that it inherits, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # installed without its source
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs
