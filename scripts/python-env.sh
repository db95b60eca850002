#!/bin/sh
# Makes the Python environment with the official SDK and the test tools, and prints its path.
#
# It lives in .nidus/venv (ignored by git), is made once, and again when the pinned versions change.
set -eu

repo=$(cd "$(dirname "$0")/.." && pwd)
venv=$repo/.nidus/venv
requirements=$repo/conformance/python/requirements.txt
constraints=$repo/conformance/python/constraints.txt
wanted=$(cat "$requirements" "$constraints" | sha256sum | cut -d' ' -f1)

if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "$wanted" ]; then
    python=$(command -v python3) || {
        echo "python-env: python3 is missing; run 'make setup'" >&2
        exit 1
    }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "python-env: $python is older than Python 3.11" >&2
        exit 1
    }
    echo "making $venv with the official SDK (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv" >&2 || {
        echo "python-env: cannot make a virtual environment; run 'make setup' (python3-venv)" >&2
        exit 1
    }
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" -c "$constraints" >&2
    printf '%s' "$wanted" >"$venv/.made-from"
fi
echo "$venv"
