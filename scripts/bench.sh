#!/bin/sh
# `make bench`: how long Sandbox.create takes, beside the least that QEMU alone needs for the same snapshot.
#
#   scripts/bench.sh [--creates N] [--floors N] [--no-docs] [--no-crates]
#
# Prints a table with the ratio p50/floor and writes it into docs/performance.md between its markers.
# Then the crates' own benches run (cargo bench), where a crate has some.
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
for benches in "$repo"/crates/*/benches; do
    [ -d "$benches" ] || continue
    package=$(sed -n 's/^name *= *"\(.*\)"/\1/p' "$(dirname "$benches")/Cargo.toml" | head -n1)
    echo
    echo "benches of $package"
    (cd "$repo" && cargo bench --quiet --package "$package" --benches)
done
