"""`byol-fast eval`."""

from __future__ import annotations

import difflib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console

from byol_fast.cli.options import complain
from byol_fast.config.evaluation import EvalSettings, FinetuneSettings, KNNSettings, LinearSettings

S = TypeVar("S", bound=EvalSettings)

USAGE = """\
usage: byol-fast eval PROTOCOL ENCODER [--train FOLDER --test FOLDER] [--baselines] [--option ...]

  knn        cosine nearest neighbours
  linear     a linear classifier: on features (--protocol fast), or the paper's protocol (--protocol reference)
  finetune   the whole network, on 1 %, 10 % and all of the labels

ENCODER is a run folder or an exported encoder. Without folders the run's own images are used. Records and pictures go
to ENCODER/eval. `byol-fast eval PROTOCOL --help` lists the options.
"""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[S]):
    """Judge an encoder on labelled images."""

    encoder: tyro.conf.Positional[Path]
    """A run folder, an exported encoder's folder, or its encoder.safetensors."""
    train: Path | None = None
    """Labelled images to learn from: whatever --data.root of training takes; a folder with train and val (or test)
    inside serves both. The run's own by default."""
    test: Path | None = None
    """Labelled images to test on, of the same classes."""
    output: Path | None = None
    """Folder for the record and its pictures; `eval` in the encoder's folder by default."""
    settings: Annotated[S, tyro.conf.arg(name="")]
    """The protocol."""


PROTOCOLS: dict[str, Any] = {
    "knn": Options[KNNSettings],
    "linear": Options[LinearSettings],
    "finetune": Options[FinetuneSettings],
}


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE, end="")
        return 0 if argv else 2
    protocol = argv[0]
    if protocol not in PROTOCOLS:
        near = difflib.get_close_matches(protocol, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(PROTOCOLS)} comes first"
        return complain(f"byol-fast eval: unknown protocol {protocol!r}; {hint}", 2)
    options: Options[Any] = tyro.cli(PROTOCOLS[protocol], args=argv[1:], prog=f"byol-fast eval {protocol}")

    from byol_fast.evaluate import evaluate_finetune, evaluate_knn, evaluate_linear, load_subject
    from byol_fast.evaluate.results import summary
    from byol_fast.utils.progress import Progress

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until here Ctrl-C ended the process plainly, see `cli`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console(highlight=False)
    subject = load_subject(options.encoder)
    assert subject.folder is not None
    evaluate: Any = {"knn": evaluate_knn, "linear": evaluate_linear, "finetune": evaluate_finetune}[protocol]
    found = evaluate(
        subject,
        options.train,
        options.test,
        settings=options.settings,
        to=options.output or subject.folder / "eval",
        progress=Progress(console),
    )
    console.print(summary(found if isinstance(found, list) else [found]))
    return 0
