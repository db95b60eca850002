"""Makes docs/compatibility.md and docs/refusals.md of what the suites have noted in a directory.

    python -m support.tables REPORTS        writes both; prints what the table of methods says in short
"""

import inspect
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import e2b
import e2b_code_interpreter
from e2b.template.main import TemplateBuilder

from .daemon import REPO

# What is not served, and why: the only words here that do not come from a test.
REASONS = {
    "from_arch_image": "names an image; what is done with images is tried in daemon/test_images.py",
    "from_bun_image": "names an image; what is done with images is tried in daemon/test_images.py",
}


def inner(member):
    """The functions behind a member of a class: descriptors of the SDK have two."""
    found, seen = [], [member]
    while seen:
        m = seen.pop()
        if inspect.isfunction(m):
            found.append(inspect.unwrap(m))
        elif isinstance(m, (staticmethod, classmethod)):
            seen.append(m.__func__)
        elif isinstance(m, property):
            continue
        elif hasattr(m, "__dict__") and not inspect.isclass(m):
            seen += [v for v in vars(m).values() if callable(v) or isinstance(v, (staticmethod, classmethod))]
    return found


def keys(cls, name):
    """What `support.methods` calls the method of a class, in all its forms."""
    for base in cls.__mro__:
        if name in vars(base):
            for function in inner(vars(base)[name]):
                code = function.__code__
                package = re.search(r"/(e2b|e2b_code_interpreter)/.*", code.co_filename)
                if package:
                    yield f"{package[0][1:]}:{code.co_qualname}"
            # The SDK's own names of the form for classes and the form for objects.
            for variant in (f"_cls_{name}", f"_class_{name}", f"_instance_{name}"):
                if variant in vars(base):
                    yield from keys(base, variant)


def public(cls):
    names = []
    for name in dir(cls):
        if not name.startswith("_") and any(name in vars(b) and inner(vars(b)[name]) for b in cls.__mro__):
            names.append(name)
    return names


def python_classes():
    from e2b.sandbox_async.commands.command import Commands as AsyncCommands
    from e2b.sandbox_async.commands.command_handle import AsyncCommandHandle
    from e2b.sandbox_async.commands.pty import Pty as AsyncPty
    from e2b.sandbox_async.filesystem.filesystem import Filesystem as AsyncFilesystem
    from e2b.sandbox_async.filesystem.watch_handle import AsyncWatchHandle
    from e2b.sandbox_async.git import Git as AsyncGit
    from e2b.sandbox_sync.commands.command import Commands
    from e2b.sandbox_sync.commands.command_handle import CommandHandle
    from e2b.sandbox_sync.commands.pty import Pty
    from e2b.sandbox_sync.filesystem.filesystem import Filesystem
    from e2b.sandbox_sync.filesystem.watch_handle import WatchHandle
    from e2b.sandbox_sync.git import Git

    return [
        ("Sandbox", e2b.Sandbox, e2b.AsyncSandbox), ("Sandbox.commands", Commands, AsyncCommands),
        ("CommandHandle", CommandHandle, AsyncCommandHandle), ("Sandbox.files", Filesystem, AsyncFilesystem),
        ("WatchHandle", WatchHandle, AsyncWatchHandle), ("Sandbox.pty", Pty, AsyncPty), ("Sandbox.git", Git, AsyncGit),
        ("Template", e2b.Template, e2b.AsyncTemplate), ("Template (builder)", TemplateBuilder, TemplateBuilder),
        ("Volume", e2b.Volume, e2b.AsyncVolume), ("Secret", e2b.Secret, e2b.AsyncSecret),
        ("code interpreter", e2b_code_interpreter.Sandbox, e2b_code_interpreter.AsyncSandbox),
    ]


def snake(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def compatibility(reports: Path) -> tuple[str, dict]:
    passed: dict[str, str] = {}
    # The SDK suites' own tests first: they are about the method, the daemon's use it for something else.
    for file in sorted(reports.glob("python-*.json"), key=lambda f: ("daemon" in f.name, f.name)):
        for key, test in json.loads(file.read_text()).items():
            passed.setdefault(key, test)
    counts = {"tested": 0, "not": []}

    # By the name of a method, the test that has called it in Python.
    in_python: dict[str, str] = {}

    def state(tests, label, name):
        tests = [t for t in tests if t]
        if tests:
            counts["tested"] += 1
            in_python.setdefault(name, tests[0])
            return tests[0]
        if same := in_python.get(snake(name)) if label == "Template" else None:
            return f"not tried in JavaScript; the server sees what Python sends it: {same}"
        reason = REASONS.get(snake(name))
        counts["not"].append(f"{label}.{name}")
        return f"**not tested**: {reason}" if reason else "**not tested**"

    out = [
        "# What of E2B's SDKs and command line is tried",
        "",
        "Made by `NIDUS_WRITE_TABLES=1 conformance/run.sh` of what its tests have called: beside each public method "
        "the first test that called it and passed. A method without one says why.",
        "",
        f"## Python, e2b {version('e2b')} and e2b-code-interpreter {version('e2b-code-interpreter')}",
    ]
    for label, sync, other in python_classes():
        base = set(public(e2b.Sandbox)) if label == "code interpreter" else set()
        out += ["", f"### {label}", "", "| method | sync | async |", "|---|---|---|"]
        for name in [n for n in public(sync) if n not in base]:
            cells = [state([passed.get(k) for k in keys(cls, name)], label, name) for cls in (sync, other) if hasattr(cls, name)]
            if sync is other:
                cells = cells[:1] * 2
            out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    known, called = [], {}
    for file in sorted(reports.glob("js-*.test.js.json")):
        said = json.loads(file.read_text())
        known = known or said["known"]
        for method in said["called"]:
            called.setdefault(method, said["file"])
    if known or called:
        package = json.loads((REPO / "conformance/js/node_modules/e2b/package.json").read_text())["version"]
        out += ["", f"## JavaScript, e2b {package}", "", "| method | test |", "|---|---|"]
        for method in sorted({*known, *called}):
            label, name = method.split(".", 1)
            if label == "CodeInterpreter" and method not in known:
                continue
            if name not in ("resolveApiOpts", "collectStackTrace", "serialize", "instructionsWithHashes", "toJSON"):
                out.append(f"| `{method}` | {state([called.get(method)], label, name)} |")
    commands = reports / "cli.json"
    if commands.exists():
        said = json.loads(commands.read_text())
        out += ["", f"## Command line, @e2b/cli {said['version']}", "", "| command | test |", "|---|---|"]
        out += [f"| `e2b {c}` | cli.test.js |" for c in sorted(said["commands"])]
    return "\n".join(out) + "\n", counts


def refusals(reports: Path) -> str | None:
    file = reports / "refusals.json"
    if not file.exists():
        return None
    out = [
        "# What is refused, and how",
        "",
        "Made by `NIDUS_WRITE_TABLES=1 conformance/run.sh` of what `python/test_refusals.py` has tried.",
        "",
        "| who | request | status | answer |",
        "|---|---|---|---|",
    ]
    seen = set()
    for row in json.loads(file.read_text()):
        # What differs from run to run is left out.
        text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\bi[a-z0-9]{20}\b|mine-[0-9a-f]{8}|sec_[0-9a-f]{32}", "ID", row["message"])
        line = "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in (row["who"], f"`{row['what']}`", str(row["status"]), text)) + " |"
        if line not in seen:
            seen.add(line)
            out.append(line)
    return "\n".join(out) + "\n"


def main() -> None:
    reports = Path(sys.argv[1])
    text, counts = compatibility(reports)
    (REPO / "docs/compatibility.md").write_text(text)
    if table := refusals(reports):
        (REPO / "docs/refusals.md").write_text(table)
    print(f"methods tried: {counts['tested']}, not: {len(counts['not'])}: {', '.join(counts['not'])}")


if __name__ == "__main__":
    main()
