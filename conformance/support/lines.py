"""pytest plugin: a line for each test as it ends, in the form of Rust's test programs, for the test bed.

`test test_files.py::test_name ... ok`, or `FAILED`, or `ignored, REASON`. What failed is told at once: the machine may
not live to the end.
"""

import textwrap

import pytest

def pytest_configure(config):
    config.pluginmanager.register(Lines(config), "nidus-lines")


class Lines:
    def __init__(self, config):
        self.config = config
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        """A test has up to three reports (set-up, call, tear-down); the worst is its outcome."""
        outcome = self.outcomes.get(report.nodeid, "ok")
        if report.failed:
            outcome = "FAILED"
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(textwrap.indent(report.longreprtext, "    "), flush=True)
        elif report.skipped and outcome == "ok":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            outcome = "ignored, " + " ".join(reason.removeprefix("Skipped: ").split())
        self.outcomes[report.nodeid] = outcome
        if report.when == "teardown":
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            # A test's name can hold anything; a line is one line.
            name = " ".join(report.nodeid.split()).replace(" ... ", " .. ")
            terminal.ensure_newline()
            if outcome == "ok" and report.capstdout:
                # What a test measured, where it says so.
                terminal.write_line(textwrap.indent(report.capstdout.rstrip(), "    "))
            terminal.write_line(f"test {name} ... {outcome}", flush=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report):
        """No letters in between: they would break the lines."""
        category, _, word = yield
        return category, "", word
