"""`byol-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from byol_fast.cli.options import parse, print_error
from byol_fast.config.evaluation import EvalSettings, FinetuneSettings, KNNSettings, LinearSettings, RetrievalSettings
from byol_fast.config.fields import expand_home, suggestion
from byol_fast.data.sources.paths import check_path
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import current
from byol_fast.utils.run_folder import encoder_files
from byol_fast.utils.signals import raise_on_interrupt

if TYPE_CHECKING:
    from byol_fast.evaluate.results import EvalResult

Images = TypeVar("Images")
S = TypeVar("S", bound=EvalSettings)

USAGE = """\
usage: byol-fast eval PROTOCOL ENCODER [--train FOLDER --test FOLDER] [--baselines] [--option ...]

  knn        cosine nearest neighbors; with --shots 1 5 10, also of 1, 5 and 10 training images per class
  linear     a linear classifier: on features (--protocol fast), or the paper's protocol (--protocol reference)
  finetune   the whole network, on 1 %, 10 % and all of the labels
  retrieval  images of the same class among all other test images: mAP, and recall at 1, 5 and 10; no --train

ENCODER is a run folder or an exported encoder. Without folders the images of the run are used. Records and charts are
written to ENCODER/eval. `byol-fast eval PROTOCOL --help` lists the options.
"""


@dataclass(frozen=True, kw_only=True)
class ClassifierImages:
    """Images that a classifier is made and tested with."""

    train: Path | None = None
    """Labeled training images: anything that --data.root of training takes; a folder with train and val (or test)
    inside serves as both. Default: the images of the run."""
    test: Path | None = None
    """Labeled test images of the same classes."""


@dataclass(frozen=True, kw_only=True)
class RetrievalImages:
    """Images that are queries and ranked."""

    test: Path | None = None
    """Labeled images: anything that --data.root of training takes. Default: the validation images of the run."""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[Images, S]):
    """Evaluate an encoder on labeled images."""

    encoder: tyro.conf.Positional[Path]
    """A run folder, an exported encoder's folder, or its encoder.safetensors."""
    images: Annotated[Images, tyro.conf.arg(name="")]
    """Labeled images."""
    output: Path | None = None
    """Folder for records and charts. Default: `eval` in the encoder's folder."""
    settings: Annotated[S, tyro.conf.arg(name="")]
    """The protocol."""


PROTOCOLS: dict[str, Any] = {
    "knn": Options[ClassifierImages, KNNSettings],
    "linear": Options[ClassifierImages, LinearSettings],
    "finetune": Options[ClassifierImages, FinetuneSettings],
    "retrieval": Options[RetrievalImages, RetrievalSettings],
}


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE, end="")
        return 0 if argv else 2
    protocol = argv[0]
    if protocol not in PROTOCOLS:
        hint = suggestion(protocol, PROTOCOLS) or f"one of {', '.join(PROTOCOLS)} comes first"
        return print_error(f"byol-fast eval: unknown protocol {protocol!r}; {hint}", 2)
    options: Options[Any, Any] = parse(PROTOCOLS[protocol], argv[1:], f"byol-fast eval {protocol}")

    encoder_files(expand_home(options.encoder))
    images = vars(options.images)
    for name, path in images.items():
        if path is not None:
            check_path(path, f"--{name}")

    from byol_fast import evaluate
    from byol_fast.evaluate.results import summary
    from byol_fast.report.evaluation_figures import accuracy_chart, save_figures

    raise_on_interrupt()  # the imports are done
    accuracy_chart({"top1": 0.5}, "trial")  # a broken matplotlib is found before the work
    progress = current()
    pretrained = evaluate.load_pretrained(options.encoder)
    assert pretrained.folder is not None
    output_dir = options.output or pretrained.folder / "eval"
    results: list[EvalResult] = []

    def on_result(result: EvalResult) -> None:
        results.append(result)
        for path in save_figures(result.to_dict(), output_dir):
            progress.print(str(path))

    run_protocol: Any = {
        "knn": evaluate.evaluate_knn,
        "linear": evaluate.evaluate_linear,
        "finetune": evaluate.evaluate_finetune,
        "retrieval": evaluate.evaluate_retrieval,
    }[protocol]
    run_protocol(
        pretrained,
        **images,
        settings=options.settings,
        output_dir=output_dir,
        progress=progress,
        on_result=on_result,
    )
    PlainConsole().print(summary(results))
    return 0
