#!/bin/sh
# `make bench`: how long Sandbox.create takes, beside the least that QEMU alone needs for the same snapshot.
#
#   scripts/bench.sh [--creates N] [--floors N] [--no-docs] [--no-crates]
#
# Prints a table with the ratio p50/floor and writes it into docs/performance.md between its markers.
# Then the code interpreter's first cell is measured, and the crates' own benches run (cargo bench), where a crate has some.
set -eu

repo=$(cd "$(dirname "$0")/.." && pwd)
export NIDUS_BIN="${NIDUS_BIN:-$repo/target/release/nidus}"
export NIDUS_DATA_DIR="${NIDUS_DATA_DIR:-/var/lib/nidus}"

[ "$(id -u)" = 0 ] || { echo "bench: must be run as root (sandboxes need namespaces and taps)" >&2; exit 1; }
[ -x "$NIDUS_BIN" ] || { echo "bench: $NIDUS_BIN is not there; run 'make build' first" >&2; exit 1; }
venv=$("$repo/scripts/python-env.sh")

crates=yes
for argument; do
    shift
    case $argument in
    --no-crates) crates=no ;;
    *) set -- "$@" "$argument" ;;
    esac
done

PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$repo/conformance" "$venv/bin/python" "$repo/scripts/bench.py" "$@"

[ "$crates" = yes ] || exit 0
# The template takes some minutes the first time.
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$repo/conformance" "$venv/bin/python" "$repo/scripts/bench_interpreter.py"
# Of the whole workspace, so that nothing is compiled again with fewer features.
names=""
for bench in "$repo"/crates/*/benches/*; do
    [ -e "$bench" ] || continue
    name=$(basename "$bench" .rs)
    names="$names --bench $name"
done
# shellcheck disable=SC2086 # one argument per word
(cd "$repo" && cargo bench --quiet --workspace $names)
