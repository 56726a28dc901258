"""The GPU queue: runs of `python -m benchmarks.gpu` with the items of `queue_items.py`, on the CPU."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import plan, results
from benchmarks.gpu.item import Item
from benchmarks.gpu.items import ITEMS
from benchmarks.gpu.summary import MAX_CHARACTERS, Outcome, summary
from tests.gpu_queue import queue_items

ROOT = Path(__file__).parents[2]
BAD = ("careless", "second", "raises", "third", "crashes", "cut_short", "many", "long_one", "hangs", "last")
MISSING = ("no_program", "no_file", "no_package", "gpu_only")


def queue_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--items", "tests.gpu_queue.queue_items", *arguments]


@dataclass
class QueueRun:
    """A run of the queue in a folder, and its output."""

    folder: Path
    code: int = 0
    output: str = ""
    errors: str = ""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        for name in queue_items.ITEMS:
            (self.folder / name.name).touch()
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {"GPU_QUEUE_TEST_FOLDER": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}
        places = ("--rehearse", "--out", str(self.folder / "out"), "--results", str(self.folder / "results"))
        return subprocess.Popen(
            queue_command(*places, *arguments),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> QueueRun:
        process = self.start(*arguments)
        self.output, self.errors = process.communicate(timeout=120)
        self.code = process.returncode
        return self

    @property
    def summary(self) -> str:
        return self.output[self.output.index("Rehearsal, figures mean nothing") :]

    def line(self, item: str) -> str:
        """The summary's line of an item."""
        (line,) = re.findall(rf"^(?:done|partial|failed|skipped) +{item} .*$", self.summary, flags=re.MULTILINE)
        return str(line)

    def archive(self) -> dict[str, str]:
        """Files of the archive, which is all that the folder OUT holds."""
        assert [path.name for path in (self.folder / "out").iterdir()] == ["results.tgz"]
        with tarfile.open(self.folder / "out" / "results.tgz") as tar:
            files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
            return {name: file.read().decode() for name, file in files.items() if file is not None}

    def result(self, item: str) -> results.Result:
        """An item's result, which lies in the archive as in the folder of results."""
        path = self.folder / "results" / "cpu" / f"{item}.jsonl"
        assert self.archive()[f"results/cpu/{item}.jsonl"] == path.read_text()
        result = results.read(path)
        assert result is not None
        return result

    def figure(self, item: str, name: str) -> Any:
        return self.result(item).figures[0][name]


def alive(pid: int) -> bool:
    """True while a process runs; False for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> QueueRun:
    """A call with items that crash, raise, hang, and lack something."""
    return QueueRun(tmp_path_factory.mktemp("bad")).run("--only", ",".join((*BAD, *MISSING)), "--minutes", "2")


def test_flags_are_restored_between_items_of_one_process(bad: QueueRun) -> None:
    assert bad.figure("careless", "pid") == bad.figure("second", "pid")
    for name in ("dtype", "flags"):
        assert bad.figure("careless", name) == bad.figure("second", name)


def test_exception_fails_its_item_alone(bad: QueueRun) -> None:
    raised = bad.result("raises")
    assert raised.status == "failed" and [figure["figure"] for figure in raised.figures] == ["before"]
    assert raised.footer["reason"].splitlines()[-1] == "ValueError: the reason of the error"
    assert "ValueError: the reason of the error" in bad.summary
    assert bad.figure("third", "pid") == bad.figure("second", "pid") and bad.result("third").status == "complete"


def test_crash_leaves_the_rest_to_a_fresh_process(bad: QueueRun) -> None:
    assert bad.result("crashes").status == "failed"
    assert "its process was ended by SIGSEGV" in bad.result("crashes").footer["reason"]
    assert "Segmentation fault" in bad.archive()["results/cpu/crashes/log.txt"]
    assert bad.figure("last", "pid") != bad.figure("third", "pid")
    assert bad.result("last").status == "complete" and bad.code == 1


def test_item_over_its_time_is_partial_and_its_processes_are_killed(bad: QueueRun) -> None:
    assert bad.result("hangs").status == "partial"
    assert "limit of 5 s" in bad.result("hangs").footer["reason"]
    assert not any(alive(pid) for pid in bad.figure("hangs", "pids"))


def test_incomplete_item_is_partial(bad: QueueRun) -> None:
    assert bad.result("cut_short").status == "partial"
    assert bad.line("cut_short").endswith("no time for the rest")


def test_item_that_does_not_fit_is_skipped(bad: QueueRun) -> None:
    assert "skipped" in bad.line("long_one") and "needs 100000 s" in bad.line("long_one")
    assert not (bad.folder / "results" / "cpu" / "long_one.jsonl").exists()


def test_missing_requirements_are_reported(bad: QueueRun) -> None:
    assert "missing: program no-such-program" in bad.line("no_program")
    assert "missing: file .gpu/no-such-file" in bad.line("no_file")
    assert "missing: package nvidia.no_such_package" in bad.line("no_package")
    assert "cannot be rehearsed: a CPU has no power limit" in bad.line("gpu_only")


def test_summary_is_short_and_last(bad: QueueRun) -> None:
    assert len(bad.summary) <= MAX_CHARACTERS and bad.summary.endswith("results.tgz\n")
    states = re.findall(r"^(done|partial|failed|skipped) +(\w+)", bad.summary, flags=re.MULTILINE)
    in_order = [item.name for item in queue_items.ITEMS if item.name in BAD + MISSING]
    assert [name for _, name in states] == in_order
    assert "figure 0: milliseconds 0" in bad.summary and re.search(r"and \d+ more in its file", bad.summary)


def test_result_records_environment_and_versions(bad: QueueRun) -> None:
    header = bad.result("second").header
    assert (
        header["environment"]["device"] == "cpu"
        and header["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    )
    assert header["commit"] == header["environment"]["commit"]
    assert header["versions"].keys() == {"torch", "triton"} and header["predicted"] == pytest.approx(1)
    assert bad.archive()["results/cpu/second/notes.txt"] == "a file of the result"


def test_second_run_continues_after_the_time_limit(tmp_path: Path) -> None:
    run = QueueRun(tmp_path)
    items = "second,quick,slow,later"
    (tmp_path / "be.slow").touch()
    run.run("--only", items, "--minutes", "0.4")
    assert run.result("second").status == run.result("quick").status == "complete"
    assert run.result("slow").status == "partial" and "end of the time limit" in run.result("slow").footer["reason"]
    assert [figure["figure"] for figure in run.result("slow").figures] == ["first"]
    assert "0 are left" in run.line("later") and "results/cpu/later.jsonl" not in run.archive()

    (tmp_path / "be.slow").unlink()
    (tmp_path / "quick").write_text("a change")
    run.run("--only", items, "--minutes", "1e6")
    assert run.code == 0
    assert run.line("second").startswith("skipped") and "answered" in run.line("second")
    assert run.line("quick").startswith("done")
    assert [figure["figure"] for figure in run.result("slow").figures] == ["first", "second"]
    assert run.result("slow").status == run.result("later").status == "complete"
    for again in (False, True):
        text = plan.listing(
            [slow_item(tmp_path)], seconds=1e9, parent=tmp_path / "results", rehearsal=True, again=again
        )
        assert ("answered" in text) is not again


def slow_item(folder: Path) -> Item:
    """The item `slow` with the file that it depends on in a test's folder."""
    (slow,) = (one for one in queue_items.ITEMS if one.name == "slow")
    return dataclasses.replace(slow, depends_on=(str(folder / "slow"),))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_archives_its_results(tmp_path: Path, number: signal.Signals) -> None:
    run = QueueRun(tmp_path)
    process = run.start("--only", "quick,hangs,last")
    until = time.monotonic() + 120
    while not (tmp_path / "hangs.started").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    run.output, run.errors = process.communicate(timeout=60)
    assert run.result("quick").status == "complete"
    interrupted = results.read(tmp_path / "results" / "cpu" / "hangs.jsonl")
    assert interrupted is not None and interrupted.status == "partial"
    if number == signal.SIGTERM:
        assert process.returncode == 1
        assert run.line("hangs").endswith("ended by SIGTERM") and run.line("last").endswith("not started: SIGTERM")
        assert run.result("hangs").figures == interrupted.figures
    until = time.monotonic() + 20
    while any(alive(pid) for pid in interrupted.figures[0]["pids"]):
        assert time.monotonic() < until
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ without a process


def item(**changes: Any) -> Item:
    return Item(**{"name": "x", "question": "", "run": "", "seconds": 60.0, "depends_on": (), **changes})


def test_digest_covers_names_and_contents_without_caches(tmp_path: Path) -> None:
    def digest() -> str:
        results.content_digest.cache_clear()
        return results.digest(item(depends_on=(str(tmp_path),)))

    (tmp_path / "a.py").write_text("1")
    first = digest()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("2")
    (tmp_path / ".cache").write_text("2")
    assert digest() == first
    (tmp_path / "a.py").write_text("2")
    second = digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, digest()}) == 3


def test_item_is_answered_only_with_the_same_versions(tmp_path: Path) -> None:
    path = results.path_of(tmp_path, item())
    results.write_header(path, item(), {}, 1.0)
    results.write_footer(path, item(), "complete", 1.0, "")
    assert plan.answered(item(), tmp_path, results.versions())
    assert not plan.answered(item(), tmp_path, {"torch": "1.0", "triton": None})
    assert not plan.answered(item(depends_on=("Makefile",)), tmp_path, results.versions())


def test_least_seconds_of_an_item() -> None:
    assert plan.least_seconds(item(), warm=False) == 60
    assert plan.least_seconds(item(), warm=True) == 52
    assert plan.least_seconds(item(first_figure=20.0), warm=True) == 12


def test_too_little_gpu_memory_is_a_missing_requirement() -> None:
    assert "needs 40 GiB of free GPU memory, 12.5 are free" in plan.missing_requirements(
        item(memory_gib=40), rehearsal=False, free_gib=12.5
    )
    assert not plan.missing_requirements(item(memory_gib=40), rehearsal=False, free_gib=70)


def test_importable_does_not_import_packages() -> None:
    code = (
        "import sys\nfrom benchmarks.gpu.plan import importable\n"
        "assert importable('torch.nn') and importable('byol_kernels') and importable('json')\n"
        "assert not importable('torch.no_such') and not importable('no_such.thing') and not importable('json.tool.x')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_summary_counts_checks_that_passed() -> None:
    figures = [{"figure": f"check {n}", "ok": n != 1, "error": 0.5} for n in range(3)]
    figures.append({"figure": "step", "ms": 2.0})
    text = summary("", [Outcome(name="a", state="complete", predicted=1, figures=figures)], "")
    assert "a: 2 checks passed\n  check 1: ok False, error 0.5\n  step: ms 2\n" in text


def test_summary_is_limited_in_length() -> None:
    figures = [{"item": "x", "figure": "f" * 300, "value": 1.0}] * 50
    outcomes = [
        Outcome(name=f"item_{number}", state="failed", predicted=1, reason="w" * 900 + "\nlast", figures=figures)
        for number in range(60)
    ]
    assert len(summary("head", outcomes[:15], "foot")) <= MAX_CHARACTERS
    assert summary("head", outcomes[:15], "foot").endswith("\nfoot\n")
    assert len(summary("head", outcomes, "foot")) <= MAX_CHARACTERS


# ------------------------------------------------------------------------------------------------ the command line


def test_list_prints_the_plan_without_torch() -> None:
    code = (
        "import sys\nfrom benchmarks.gpu.queue import main\n"
        "main(['--list', '--rehearse', '--items', 'tests.gpu_queue.queue_items', '--minutes', '0.5'])\n"
        "main(['--list'])\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(r"^careless +9 +9  what does careless do\?\n +runs$", shown, flags=re.MULTILINE)
    assert re.search(r"^second +9 +10  .*\n +runs$", shown, flags=re.MULTILINE)
    assert re.search(r"^long_one +.*\n +SKIPPED: needs 100000 s, \d+ are left$", shown, flags=re.MULTILINE)
    assert re.search(r"^slow +.*\n +runs partially in the \d s that are left$", shown, flags=re.MULTILINE)
    assert re.search(r"^gpu_only +.*\n +SKIPPED: cannot be rehearsed: .*$", shown, flags=re.MULTILINE)


def test_make_target_lists_the_queue() -> None:
    command = ["make", "gpu", "LIST=1", "MINUTES=6.3", f"PYTHON={sys.executable}", "NO_VENV=1"]
    shown = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert all(one.question in shown for one in ITEMS)
    assert f"of {len(ITEMS)} items would run in 378 s" in shown


@pytest.mark.parametrize("option", ["--results", "--out"])
def test_rehearsal_rejects_the_results_folder(option: str) -> None:
    into = ROOT / "benchmarks" / "results" / "a_gpu"
    command = queue_command("--rehearse", option, str(into))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "benchmarks/results" in process.stderr.splitlines()[-1]
    assert not into.exists()


def test_unknown_item_is_rejected() -> None:
    command = queue_command("--only", "quick,unknown")
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "got unknown" in process.stderr


def test_error_without_a_gpu_names_the_rehearsal(tmp_path: Path) -> None:
    command = queue_command("--out", str(tmp_path / "out"))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "no CUDA device; REHEARSE=1" in process.stderr


@pytest.mark.parametrize("one", ITEMS, ids=lambda one: one.name)
def test_item_dependencies_and_function_exist(one: Item) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", one.name) and [other.name for other in ITEMS].count(one.name) == 1
    assert one.depends_on and all((ROOT / name).exists() for name in one.depends_on)
    module, _, function = one.run.partition(":")
    assert f"\ndef {function}(context: Context)" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert one.question and one.seconds > 0 and (one.first_figure is None or one.first_figure <= one.seconds)
