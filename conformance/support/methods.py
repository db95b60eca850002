"""A pytest plugin: which methods of the SDK the tests that passed have called.

Loaded by the suites' conftest. What it sees goes to $NIDUS_REPORT_DIR, from where `support.compatibility`
makes docs/compatibility.md; without that directory it does nothing.
"""

import json
import os
import sys
import threading
from pathlib import Path

import e2b
import e2b_code_interpreter
import pytest

REPORTS = os.environ.get("NIDUS_REPORT_DIR")
PACKAGES = tuple(str(Path(p.__file__).parent) for p in (e2b, e2b_code_interpreter))
ours: dict = {}
called: set[str] = set()
passed: dict[str, str] = {}


def key_of(code) -> str | None:
    """`module file:Class.method` of code that belongs to an SDK."""
    for package in PACKAGES:
        if code.co_filename.startswith(package):
            return f"{Path(package).name}{code.co_filename[len(package):]}:{code.co_qualname}"
    return None


def look(frame, event, _arg):
    if event == "call":
        code = frame.f_code
        key = ours.get(code, ours)
        if key is ours:
            key = ours[code] = key_of(code)
        if key:
            called.add(key)


if REPORTS:

    def pytest_runtest_setup(item):
        called.clear()
        threading.setprofile(look)
        sys.setprofile(look)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item, call):
        report = (yield).get_result()
        if report.when == "call" and report.passed:
            for key in called:
                passed.setdefault(key, f"{item.path.name}::{item.originalname or item.name}")

    def pytest_sessionfinish(session):
        sys.setprofile(None)
        threading.setprofile(None)
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        folder = Path(REPORTS)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"python-{Path(session.config.rootpath).name}-{worker}.json").write_text(json.dumps(passed))
