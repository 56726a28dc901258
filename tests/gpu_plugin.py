"""Writes what happens to each test as it happens, a line of JSON at a time: what a process that dies leaves behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import CAPABILITIES

RESULTS = os.environ.get("BYOL_FAST_GPU_RESULTS", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capability", choices=sorted(CAPABILITIES), help="of the tests marked gpu, only this one's")


def _write(**record: Any) -> None:
    with Path(RESULTS).open("a") as file:
        file.write(json.dumps(record) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(kind="start", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _write(
        kind="report",
        test=report.nodeid,
        when=report.when,
        outcome=report.outcome,
        seconds=report.duration,
        why=_why(report),
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(kind="report", test=report.nodeid, when="collect", outcome="failed", seconds=0.0, why=_why(report))


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip, or the message of an error without its traceback."""
    if report.passed or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)[-2000:]
