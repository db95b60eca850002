#!/bin/sh
# A suite in the test bed's machine (crates/testbed/jobs.toml), where KVM is real and there is no network:
# daemons on the machine's own disk, with the driver that the environment chooses.
#
#   testbed.sh PREPARED python|daemon [pytest's arguments]
#
# PREPARED is the directory that scripts/testbed-base.sh made. NIDUS_VMM names the driver; the suite
# fails if the daemon took another one. Each test is a line of output in the form of Rust's test programs.
set -eu

prepared=$1
suite=$2
shift 2
repo=$(cd "$(dirname "$0")/.." && pwd)
python=/usr/bin/python3
data=/var/lib/nidus-e2e-${NIDUS_VMM:?names the driver}

fail() {
    echo "testbed.sh: $*" >&2
    exit 1
}

[ "${NIDUS_TESTBED:-}" = 1 ] || fail "is meant for the test bed's machine: cargo run --release -p nidus-testbed -- test --only e2e-qemu"

mkdir -p "$data"
cp -r "$prepared/kernels" "$data/"
# No bytecode: the checkout cannot be written from here.
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$prepared/python" NIDUS_TEST_DATA_DIR="$data" NIDUS_TEST_INHERIT=1
export NIDUS_LOCAL_IMAGES="debian:bookworm=$prepared/rootfs.ext4"

NIDUS_DATA_DIR=$data "$NIDUS_BIN" doctor || fail "the doctor finds that sandboxes cannot run here"
cd "$repo/conformance"
pytest="$python -m pytest -q -p no:cacheprovider -p no:xdist -p support.lines"
case $suite in
python)
    # shellcheck disable=SC2016 # expanded by the inner shell
    exec "$python" -m support.with_daemon -- sh -c '
        python=$1 pytest=$2 && shift 2
        "$python" -m support.driver || exit 1
        cd python && exec $pytest "$@"' sh "$python" "$pytest" "$@"
    ;;
daemon)
    cd daemon
    # shellcheck disable=SC2086 # words
    exec $pytest "$@"
    ;;
*) fail "no suite is called $suite: python or daemon" ;;
esac
