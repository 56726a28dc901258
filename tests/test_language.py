"""The field's words: identifiers that were replaced, and spellings, stay out of the code and the documentation."""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("byol_fast", "kernels", "tests", "benchmarks", "docs")
SUFFIXES = {".py", ".md", ".toml"}

REPLACED = {
    # models
    "SelfSupervisedTask": "SSLModel",
    "TaskOutput": "ModelOutput",
    "training_output": "forward_train",
    "make_task": "build_model",
    "more_to_come": "no_sync",
    "call_online_through": "wrap_online",
    "collapse_std": "embedding_std",
    "views_stacked": "num_splits",
    "keep_to_itself": "disable_sync",
    "views_note": "not_batched_reason",
    # training
    "CapturedStep": "CUDAGraphStep",
    "leave_no_trace": "restore_state_after",
    "choose_mode": "resolve_mode",
    "weights_changed": "on_weights_loaded",
    "LossScale": "GradScaler",
    "BufferGuard": "BufferSnapshot",
    "WeightCopies": "LowPrecisionWeights",
    "hand_over_gradients": "move_grads",
    "StopRequest": "GracefulShutdown",
    "max_bad_steps": "max_skipped_steps",
    "effective_batch": "global_batch_size",
    # processes
    "from_leader": "run_on_main",
    "leader_first": "main_process_first",
    "LeaderError": "MainProcessError",
    # data
    "ViewDraws": "AugmentParams",
    "PlannedLoader": "DeterministicLoader",
    "SideStream": "AugmentStream",
    "ResidentLoader": "DeviceCacheLoader",
    "draw_view": "sample_view_params",
    "crop_window": "crop_box",
    "blur_window": "blur_kernel_size",
    "Prefetcher": "ImageReader",
    "BadImageError": "CorruptImageError",
    "bad_images": "corrupt_images",
    "on_bad": "on_corrupt",
    "max_bad": "max_corrupt_fraction",
    # evaluation, tools
    "Workplace": "EvalContext",
    "hold_out": "train_val_split",
    "contender": "candidate",
    "textbook": "baseline",
    "restatement": "reference",
    "images_per_s": "images_per_second",
}
ALLOWED = {
    "SelfSupervisedTask": {
        "benchmarks/guide_original.py",
        "byol_fast/compat/guide.py",
        "byol_fast/compat/guide_model.py",
        "tests/compat/guide_script.py",
        "tests/compat/test_guide.py",
    },
}
"""The name of a class in the practical guide, whose script runs unchanged."""

SPELLINGS = {
    r"normalis": "normaliz",
    r"colour": "color",
    r"cent(?:re|red|ring)": "center",
    r"neighbour": "neighbor",
    r"behaviour": "behavior",
    r"labell": "label",
    r"recognis": "recogniz",
    r"synchronis": "synchroniz",
    r"initialis": "initializ",
    r"optimis": "optimiz",
    r"regularis": "regulariz",
    r"standardis": "standardiz",
    r"summaris": "summariz",
    r"\bgrey": "gray",
    r"judgement": "judgment",
}


@functools.cache
def texts() -> dict[str, str]:
    """Text of each source and document, by its path in the repository, without this file and the measurements."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml"]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    names = {str(path.relative_to(ROOT)): path for path in paths if path.is_file()}
    return {name: path.read_text() for name, path in names.items() if is_checked(name)}


def is_checked(name: str) -> bool:
    """False for this file and for records of measurements."""
    return name != "tests/test_language.py" and not name.startswith("benchmarks/results/")


def test_replaced_identifiers_are_gone() -> None:
    found = []
    words = re.compile(rf"\b(?:{'|'.join(REPLACED)})\b")
    for name, text in texts().items():
        replaced = sorted(old for old in set(words.findall(text)) if name not in ALLOWED.get(old, ()))
        found += [f"{name}: {old} is called {REPLACED[old]}" for old in replaced]
    assert not found, "\n".join(found)


def test_spelling_is_american() -> None:
    found = []
    for name, text in texts().items():
        for pattern, spelling in SPELLINGS.items():
            for match in re.finditer(pattern, text, re.IGNORECASE):
                number = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{number}: {match[0]!r} is spelled with {spelling!r}")
    assert not found, "\n".join(found)


def test_no_conflict_of_a_merge_is_left() -> None:
    assert not [name for name, text in texts().items() if re.search("^(<{7}|>{7})( |$)", text, re.MULTILINE)]


def test_docstrings_say_what_a_thing_is() -> None:
    """A first line is a noun or a verb, not a question word."""
    question = re.compile(r'^\s*"""(What|Whether|How|Who|Why|So many|As many)\b', re.MULTILINE)
    found = []
    for name, text in texts().items():
        if name.endswith(".py"):
            found += [f"{name}: {match[0].strip()}" for match in question.finditer(text)]
    assert not found, "\n".join(found)
