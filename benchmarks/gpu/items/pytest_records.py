"""Pytest plugin: only the tests of one GPU capability, and a JSON line for whatever happens to each test.

A line at a time, so that a process that dies leaves behind what it had found, and which test it was in.
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
    """`--capability NAME`, which tests/conftest.py obeys."""
    parser.addoption("--capability", choices=sorted(CAPABILITIES), help="of the tests marked gpu, only this one's")


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write(kind="start", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Set-up, call or teardown of a test is over."""
    _write(
        kind="report",
        test=report.nodeid,
        when=report.when,
        outcome=report.outcome,
        seconds=round(report.duration, 3),
        why=_why(report),
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file could not be collected."""
    if report.failed:
        _write(kind="report", test=report.nodeid, when="collect", outcome="failed", seconds=0.0, why=_why(report))


def _write(**record: Any) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip, or the message of an error without its traceback."""
    if report.passed or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)[-2000:]
