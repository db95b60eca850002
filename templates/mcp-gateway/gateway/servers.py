"""Which servers there are, how they are installed, and how each is started."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CATALOG = Path("/etc/mcp-gateway/catalog.json")
# More catalogues of the same form, for templates that bring servers of their own.
CATALOGS = Path("/etc/mcp-gateway/catalog.d")
PLACE = Path("/opt/mcp")
GITHUB = re.compile(r"github/([A-Za-z0-9][A-Za-z0-9-]*)/([A-Za-z0-9._-]+)")
INSTALL_SECONDS = 600


class Failure(Exception):
    """What cannot be done, for people."""


@dataclass
class Server:
    """How one is started."""

    name: str
    command: list
    env: dict = field(default_factory=dict)
    cwd: str | None = None


def catalog() -> dict:
    known = {}
    for path in [CATALOG, *sorted(CATALOGS.glob("*.json"))]:
        try:
            known |= json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise Failure(f"the catalogue {path} cannot be read: {e}") from e
    return known


def say(text: str) -> None:
    print(f"mcp-gateway: {text}", flush=True)


def run(what: str, command, **options) -> None:
    """To its end, or a Failure with the end of what it said."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=INSTALL_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Failure(f"{what}: {e}") from e
    if done.returncode:
        raise Failure(f"{what}: exit code {done.returncode}\n{done.stdout.decode(errors='replace')[-2000:]}")


def install(name: str, settings: dict) -> None:
    """Puts a server into its place, unless it is there. Whole or not at all."""
    place = PLACE / name
    if place.exists():
        return
    draft = place.with_name(f".{place.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    say(f"installing {name}")
    github = GITHUB.fullmatch(name)
    if github:
        run(f"get {name}", ["git", "clone", "-q", "--depth", "1", f"https://github.com/{github[1]}/{github[2]}", str(draft)])
        command = either(settings, "installCmd", "install_cmd")
        if command:
            run(f"install {name}", ["sh", "-c", command], cwd=draft, env=os.environ | envs(settings))
    else:
        entry = entry_of(name)
        if "pypi" in entry:
            pip = [sys_python(), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", "--root-user-action=ignore"]
            run(f"install {name}", [*pip, "--target", str(draft), entry["pypi"]])
        elif "npm" in entry:
            if not shutil.which("npm"):
                raise Failure(f"{name} is an npm package and this template has no npm: README.md says how to have one")
            run(f"install {name}", ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(draft), entry["npm"]])
        else:
            draft.mkdir()
    draft.rename(place)


def sys_python() -> str:
    return "/usr/bin/python3"


def entry_of(name: str) -> dict:
    known = catalog()
    if name not in known:
        raise Failure(f"there is no server '{name}': {', '.join(sorted(known))} are known, and github/OWNER/REPOSITORY")
    return known[name]


def either(settings: dict, *names):
    return next((settings[n] for n in names if settings.get(n)), None)


def envs(settings: dict) -> dict:
    return {str(k): str(v) for k, v in (settings.get("envs") or {}).items()}


def server(name: str, settings) -> Server:
    """How an installed server is started with its settings."""
    if not isinstance(settings, dict):
        raise Failure(f"the settings of {name} are not an object")
    place = PLACE / name
    if GITHUB.fullmatch(name):
        command = either(settings, "runCmd", "run_cmd")
        if not isinstance(command, str):
            raise Failure(f"{name} has no runCmd")
        return Server(name, ["sh", "-c", f"exec {command}"], envs(settings), str(place))
    entry = entry_of(name)
    program, *arguments = entry["run"]
    env = {}
    for variable, key in entry.get("env", {}).items():
        if settings.get(key) not in (None, ""):
            env[variable] = str(settings[key])
    if "arguments" in entry:
        for value in settings.get(entry["arguments"]) or []:
            arguments += [entry["flag"], str(value)] if "flag" in entry else [str(value)]
    if "pypi" in entry:
        env["PYTHONPATH"] = str(place)
        command = [sys_python(), str(place / "bin" / program)]
    elif "npm" in entry:
        command = [str(place / "node_modules" / ".bin" / program)]
    else:
        command = [program]
    return Server(name, command + arguments, env)


def shown(s: Server) -> str:
    return shlex.join(s.command)
