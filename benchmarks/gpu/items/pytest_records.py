"""Pytest plugin: selects the tests of one GPU capability, and writes a JSON line per event of each test.

Lines are written at once, so that a process that dies leaves its results and the name of the running test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import CAPABILITIES

VARIABLE = "BYOL_FAST_TEST_RECORDS"
"""Environment variable that holds the path of the file of JSON lines."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--capability NAME`, which tests/conftest.py evaluates."""
    parser.addoption("--capability", choices=sorted(CAPABILITIES), help="run only the gpu tests of this capability")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Record the start of a test."""
    _write(kind="start", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of a set-up, call or teardown."""
    _write(
        kind="report",
        test=report.nodeid,
        when=report.when,
        outcome=report.outcome,
        seconds=round(report.duration, 3),
        why=_why(report),
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a file that could not be collected."""
    if report.failed:
        _write(kind="report", test=report.nodeid, when="collect", outcome="failed", seconds=0.0, why=_why(report))


def _write(**record: Any) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Reason of a skip, or message of an error without its traceback."""
    if report.passed or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)[-2000:]
