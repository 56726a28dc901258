"""Seeded command lines: options with values at and beyond every bound, odd paths and odd data, mistyped words.

The options of each command are read from its `--help`, so that new ones are covered as soon as they exist. All paths
are relative to a copy of the zoo (`zoo.py`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from byol_fast.cli.main import main
from byol_fast.config import recipes
from tests.cli import zoo

SMALL = {
    "--model.encoder": ["small"],
    "--model.hidden-dim": ["16"],
    "--model.projection-dim": ["8"],
    "--view1.size": ["16"],
    "--view2.size": ["16"],
    "--batch-size": ["4"],
    "--steps": ["2"],
    "--epochs": ["1"],
    "--log-every": ["1"],
    "--device": ["cpu"],
    "--precision": ["fp32"],
    "--data.threads": ["1"],
    "--data.loader": ["threaded"],
}
"""Options of a run of a second, also with `--steps 0`. The encoder is `tests.networks.SmallResidualNetwork`."""


def commands_of_good_run(zoo_folder: Path) -> list[list[str]]:
    """Command lines that make the good run of the zoo."""
    options = SMALL | {"--data.root": [f"{zoo_folder}/good"], "--name": ["good"], "--checkpoint-every": ["1"]}
    return [
        CommandLine(["train", "cifar10_resnet18"], [], options).argv(),
        ["eval", "knn", zoo.GOOD_RUN, "--device", "cpu"],
        ["report", zoo.GOOD_RUN],
    ]


# --- values

INTEGERS = [
    *(-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 8, 9, 20, 50, 51, 64, 65, 256, 257, 501, 503, 1000, 1001, 1024, 1025),
    *(8192, 8193, 10_000, 10_001, 16_384, 16_385, 65_535, 65_536, 65_537, 100_000, 100_001, 10**6, 10**6 + 1),
    *(10**9, 10**9 + 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40),
]
FLOATS = [
    *("0", "-0.0", "1e-12", "9e-13", "1e-6", "9e-7", "1e-4", "9e-5", "0.001", "0.00099", "0.01", "0.0099", "0.5"),
    *("0.5000001", "0.9", "1", "1.0000001", "10", "10.1", "80", "80.1", "100", "101", "1e4", "10001", "-1", "-10"),
    *("1e-45", "1e-308", "1e-320", "3.4e38", "1e39", "1e308", "-1e308", "1e400", "nan", "inf", "-inf"),
]
"""The bounds of the options, values beyond them, and what numbers of 32 and 64 bits cannot hold."""
TEXTS = ["", " ", "ü", "日本", "x" * 300, "a/b", "..", "[/b]", "%s%d", "a\nb", "-", "\udce9", "None", "💥" * 70]
NO_NUMBERS = ["", "x", "1.5", "1e3", "0x10", "1_000", "٣", "1,5", "None", "9" * 5000]

LONG_RUNS = {
    "--steps": (3, 10**9),
    "--grad-accum-steps": (3, 65_536),
    "--epochs": (3, 10**6),
    "--view1.size": (64, 8192),
    "--rounds": (1, 1000),
    "--seeds": (1, 1000),
    "--steps-per-round": (1, 10_000),
    "--image-size": (64, 8192),
    "--data-images": (8, 100_000),
    "--kernel-images": (4, 16_384),
}
"""Options of which a large value makes a run long or large, rightly: values between these two are left out."""

RUN_FOLDERS = [zoo.GOOD_RUN, *(f"runs/{name}" for name in zoo.RUNS)]
OUTPUTS = [
    *("new", "new/deep/file", "folder", "file.txt", "file.txt/below", "read_only/file", ".", "", "..", "x" * 300),
    *("ü", "a\nb", "[/b]", "%s", "\udce9", " ", "fifo", "~nouser/file", "/proc/file", "runs/good", "~"),
]
CHOICES_LEFT_OUT = {"compile": "the compiler takes minutes"}
OPTIONS_LEFT_OUT = {"--only": "without it, benchmarks take minutes"}
WORDS: dict[str, list[str]] = {
    "--model.encoder": ["small", "resnet18_narrow", "alexnet", "mobilenet_v3_small", "swin_t", "timm/", "resnet51"],
    "--encoder": ["resnet18_narrow"],
    "--recipe": ["demo", "cifar10_resnet18"],
    "--gpu": ["A100", "h100", "RTX 4090"],
    "--level": ["A", "B", "D", "E", "F"],
    "--data.image-column": ["image", "label"],
    "--data.label-column": ["label", "image"],
}
"""Texts that have a meaning for an option."""


@dataclass(frozen=True)
class Option:
    """An option of a command, as its `--help` shows it."""

    name: str
    negated: str
    """`--no-...` of a flag, otherwise empty."""
    metavar: str
    """`INT`, `FLOAT FLOAT`, `{None}|PATH`, `[STR [STR ...]]`, `{auto,cpu,cuda}`; empty for a flag."""


@functools.cache
def options_of(*command: str) -> tuple[Option, ...]:
    """All options of a command."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    lines = re.findall(r"^  (--[\w.-]+)(?:, (--[\w.-]+))?(?: (\S.*?))?(?:  .*)?$", shown.getvalue(), re.MULTILINE)
    assert "--help" in shown.getvalue(), shown.getvalue()
    return tuple(Option(*(part.strip() for part in line)) for line in lines)


# --- command lines


@dataclass
class CommandLine:
    """A command with its positional arguments and options."""

    command: list[str]
    positional: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)
    help_of: tuple[str, ...] = ()
    """The command whose `--help` lists the options; empty: `command`."""

    def argv(self) -> list[str]:
        """The words."""
        return [*self.command, *self.positional, *(w for name, values in self.options.items() for w in (name, *values))]


def command_line(number: int) -> list[str]:
    """The words of a seeded command line."""
    rng = random.Random(number)
    (kind,) = rng.choices(list(_KINDS), weights=[weight for _, weight in _KINDS.values()])
    line = _KINDS[kind][0](rng)
    options = [o for o in options_of(*(line.help_of or line.command)) if o.name not in OPTIONS_LEFT_OUT]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        if not options:
            break
        option = rng.choice(options)
        line.options[option.negated if option.negated and rng.random() < 0.5 else option.name] = _values(rng, option)
    if "--view1.size" in line.options:  # both must be equal
        line.options["--view2.size"] = line.options["--view1.size"]
    argv = line.argv()
    is_mistyped = rng.random() < 0.15 and not OPTIONS_LEFT_OUT.keys() & set(argv)
    return _mistype(rng, argv, len(line.command)) if is_mistyped else argv


def _values(rng: random.Random, option: Option) -> list[str]:
    """Values of an option: as many as it takes, now and then another number of them, or of another type."""
    metavar = option.metavar
    if not metavar:
        return ["maybe"] if rng.random() < 0.05 else []
    many = re.fullmatch(r"\[(\S+) \[.*\.\.\.\]\]", metavar)
    kinds = [many[1]] * rng.choice((0, 1, 2, 3)) if many else metavar.split(" ")
    if rng.random() < 0.05:
        kinds = kinds[1:] or kinds * 2
    return [_value(rng, option.name, kind) for kind in kinds]


def _value(rng: random.Random, option: str, metavar: str) -> str:
    metavar = metavar.removeprefix("{None}|")
    if metavar.startswith("{"):
        choices = [choice for choice in metavar.strip("{}").split(",") if choice not in CHOICES_LEFT_OUT]
        return rng.choice(choices * 2 + [rng.choice(TEXTS)])
    if metavar in {"INT", "FLOAT"} and rng.random() < 0.1:
        return rng.choice(NO_NUMBERS)
    if metavar == "INT":
        smallest, largest = LONG_RUNS.get(option, (0, -1))
        return str(rng.choice([i for i in INTEGERS if not smallest < i <= largest]))
    if metavar == "FLOAT":
        return rng.choice(FLOATS)
    if metavar == "PATH":
        return _path(rng, option)
    return rng.choice(TEXTS + WORDS.get(option, []) * 4)


def _path(rng: random.Random, option: str) -> str:
    if option in {"--out", "--output", "--plot", "--neighbors", "--save", "--cache", "--data.cache"}:
        suffix = rng.choice(("", ".html", ".npz", ".parquet", ".png", ".svg", ".json", ".jpg"))
        return rng.choice(OUTPUTS) + (suffix if rng.random() < 0.7 else "")
    return _images(rng) if rng.random() < 0.9 else rng.choice([*OUTPUTS, *RUN_FOLDERS])


def _images(rng: random.Random) -> str:
    return rng.choice(zoo.IMAGES)


def _mistype(rng: random.Random, argv: list[str], first: int) -> list[str]:
    """A word left out, doubled, misspelled, swapped or added, behind the name of the command."""
    at = rng.randrange(min(first, len(argv) - 1), len(argv))
    word = argv[at]
    cut = rng.randrange(len(word) + 1)
    instead: list[list[str]] = [
        [],
        [word, word],
        [word[:cut] + word[cut + 1 :]],
        [word[:cut] + rng.choice("-=.é[\n") + word[cut:]],
        [rng.choice(TEXTS), word],
        [word, "--nonsense", rng.choice(TEXTS)],
        [f"{word}=3"],
        ["--", word],
    ]
    return argv[:at] + rng.choice(instead) + argv[at + 1 :]


# --- commands


def _run_options(rng: random.Random, **changes: list[str]) -> dict[str, list[str]]:
    options = {**SMALL, "--data.root": [_images(rng) if rng.random() < 0.5 else "good"]}
    return options | {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in changes.items()}


def _recipe(rng: random.Random) -> str:
    return rng.choice(["cifar10_resnet18", "cifar10_resnet18", *recipes.RECIPES])


def _run_folder(rng: random.Random) -> str:
    return zoo.GOOD_RUN if rng.random() < 0.4 else rng.choice(RUN_FOLDERS)


def _training(rng: random.Random) -> CommandLine:
    if rng.random() < 0.7:
        on_corrupt = {"data__on_corrupt": ["skip"]} if rng.random() < 0.4 else {}
        return CommandLine(["train"], [_recipe(rng)], _run_options(rng, name=["it"], **on_corrupt), _TRAIN)
    if rng.random() < 0.7:
        options = {"--resume": [_run_folder(rng)]}
        if rng.random() < 0.3:
            options["--data.accept-changed"] = []
        return CommandLine(["train"], [], options, _TRAIN)
    options = _run_options(rng, name=[Path(_run_folder(rng)).name], resume=["auto"])
    return CommandLine(["train"], ["cifar10_resnet18"], options, _TRAIN)


def _demo(rng: random.Random) -> CommandLine:
    options = _run_options(rng, knn__enabled=["off"], name=["it"])
    del options["--data.root"]
    return CommandLine(["demo"], [], options)


def _preview(rng: random.Random) -> CommandLine:
    options = _run_options(rng, num=["2"])
    if rng.random() < 0.3:
        options["--check"] = []
    return CommandLine(["preview"], [_recipe(rng)], options, ("preview", "demo"))


def _doctor(rng: random.Random) -> CommandLine:
    options = {"--data.root": [_images(rng)], "--data.threads": ["1"]}
    return CommandLine(["doctor"], [], options | ({"--fast": []} if rng.random() < 0.3 else {}))


def _export(rng: random.Random) -> CommandLine:
    return CommandLine(["export"], [_run_folder(rng)])


def _evaluation(rng: random.Random) -> CommandLine:
    protocol = rng.choice(("knn", "linear", "finetune", "retrieval"))
    options: dict[str, list[str]] = {"--device": ["cpu"], "--threads": ["1"]}
    if rng.random() < 0.6:
        options |= {"--test": [_images(rng)] if rng.random() < 0.5 else ["good/val"]}
        options |= {"--train": [_images(rng)]} if protocol != "retrieval" else {}
    if protocol == "finetune":
        options |= {"--epochs": ["1"], "--batch-size": ["4"], "--labels": ["1.0"]}
    elif protocol == "knn" and rng.random() < 0.3:
        options |= {"--shots": ["1", "3"]}
    elif protocol == "linear" and rng.random() < 0.5:
        options |= {"--protocol": ["reference"], "--epochs": ["1"], "--batch-size": ["4"]}
    encoder = _run_folder(rng) + ("/encoder.safetensors" if rng.random() < 0.1 else "")
    return CommandLine(["eval", protocol], [encoder], options)


def _embed(rng: random.Random) -> CommandLine:
    options: dict[str, list[str]] = {"--device": ["cpu"], "--threads": ["1"]}
    if rng.random() < 0.5:
        options["--output"] = [rng.choice(("features.npz", "features.parquet"))]
    if rng.random() < 0.5:
        options["--on-corrupt"] = ["skip"]
    if rng.random() < 0.3:
        options["--neighbors"] = ["sheet.png"]
    return CommandLine(["embed"], [_run_folder(rng), _images(rng)], options)


def _report(rng: random.Random) -> CommandLine:
    runs = [_run_folder(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return CommandLine(["report"], runs, {"--no-images": []} if rng.random() < 0.3 else {})


def _profile(rng: random.Random) -> CommandLine:
    return CommandLine(["profile"], [_recipe(rng)], _run_options(rng, steps=["1"], name=["it"]), ("profile", "demo"))


def _roofline(rng: random.Random) -> CommandLine:
    options = {name: values for name, values in SMALL.items() if not name.startswith("--data")}
    for name in ("output", "plot"):
        if rng.random() < 0.3:
            options[f"--{name}"] = [_path(rng, f"--{name}")]
    return CommandLine(["roofline"], [_recipe(rng)], options, ("roofline", "demo"))


def _bench(rng: random.Random) -> CommandLine:
    if rng.random() < 0.5:
        return CommandLine(["bench", "compare"], [rng.choice([_run_folder(rng), _images(rng)]) for _ in range(2)])
    if rng.random() < 0.5:
        options = _run_options(rng)
        del options["--steps"]
        return CommandLine(["bench", "cifar10"], [_recipe(rng)], options)
    options = {"--rounds": ["1"], "--kernel-images": ["1"], "--data-images": ["1"], "--only": ["nothing"]}
    return CommandLine(["bench"], [rng.choice(("kernels", "data"))], options | {"--device": ["cpu"]})


_TRAIN = ("train", "cifar10_resnet18")
_KINDS: dict[str, tuple[Callable[[random.Random], CommandLine], float]] = {
    "train": (_training, 7),
    "embed": (_embed, 3),
    "eval": (_evaluation, 3),
    "report": (_report, 2),
    "doctor": (_doctor, 1),
    "preview": (_preview, 2),
    "export": (_export, 1),
    "roofline": (_roofline, 1),
    "demo": (_demo, 0.5),
    "bench": (_bench, 0.5),
    "profile": (_profile, 0.5),
}
