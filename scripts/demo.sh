#!/bin/sh
# `make demo`: the whole way from a build to code that ran in a sandbox, through the official Python SDK.
#
# Starts the daemon (the first start builds the base template), creates a sandbox, runs Python in it,
# writes and reads a file, serves a port through the proxy, kills it, stops the daemon, prints how long
# each step took, and checks that nothing stayed behind.
#
# NIDUS_DATA_DIR (default /var/lib/nidus) keeps the template between runs, so the second run takes
# seconds. A daemon that already serves this data directory is used as it is and left running.
set -eu

repo=$(cd "$(dirname "$0")/.." && pwd)
export NIDUS_BIN="${NIDUS_BIN:-$repo/target/release/nidus}"
export NIDUS_DATA_DIR="${NIDUS_DATA_DIR:-/var/lib/nidus}"

[ "$(id -u)" = 0 ] || { echo "demo: must be run as root (sandboxes need namespaces and taps)" >&2; exit 1; }
[ -x "$NIDUS_BIN" ] || { echo "demo: $NIDUS_BIN is not there; run 'make build' first" >&2; exit 1; }
venv=$("$repo/scripts/python-env.sh")

before=$(mktemp)
trap 'rm -f "$before"' EXIT
"$repo/scripts/leakcheck.sh" snapshot "$before"
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$repo/conformance" "$venv/bin/python" "$repo/scripts/demo.py"
"$repo/scripts/leakcheck.sh" compare "$before"
