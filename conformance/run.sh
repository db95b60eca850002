#!/bin/sh
# Drives a real nidus with the official SDKs, and ill-treats its daemon. Needs root and a build.
#
#   conformance/run.sh [python] [js] [daemon]     the suites to run; all of them by default
#
# NIDUS_BIN            the binary (default target/release/nidus)
# NIDUS_TEST_DATA_DIR  its data directory (default /var/lib/nidus-test); the base template is built
#                      in it once and stays there
# PYTEST_ARGS          more arguments for pytest, e.g. "-k proxy -x"
#
# NIDUS_WRITE_TABLES   when set, docs/compatibility.md and docs/refusals.md are made of what the suites tried
#
# Afterwards the host is compared with what it was before: anything left behind is a failure.
set -u

repo=$(cd "$(dirname "$0")/.." && pwd)
here=$repo/conformance
suites=${*:-python js daemon}
export NIDUS_BIN="${NIDUS_BIN:-$repo/target/release/nidus}"
export NIDUS_TEST_DATA_DIR="${NIDUS_TEST_DATA_DIR:-/var/lib/nidus-test}"

fail() {
    echo "conformance: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "must be run as root (sandboxes need namespaces and taps)"
[ -x "$NIDUS_BIN" ] || fail "$NIDUS_BIN is not there; run 'make build' first"
venv=$("$repo/scripts/python-env.sh") || exit 1
node=
case " $suites " in *" js "*) node=$("$repo/scripts/node-env.sh") || exit 1 ;; esac

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
[ -n "${NIDUS_WRITE_TABLES:-}" ] && export NIDUS_REPORT_DIR="$results/tried"
export PYTHONDONTWRITEBYTECODE=1 NIDUS_DATA_DIR="$NIDUS_TEST_DATA_DIR"
"$repo/scripts/leakcheck.sh" snapshot "$results/host-before" || exit 1
unset NIDUS_DATA_DIR

# One test process per core, two at most: the virtual machines are emulated and need cores too.
workers=$(nproc)
[ "$workers" -gt 2 ] && workers=2
status=0
cd "$here" || exit 1

started=$(date +%s)
files=""
sdk_suites=""
for suite in $suites; do
    case $suite in
    python)
        sdk_suites="$sdk_suites (cd python && $venv/bin/pytest -q -p no:cacheprovider -n $workers --dist loadfile --junitxml=$results/python.xml ${PYTEST_ARGS:-});"
        ;;
    js)
        sdk_suites="$sdk_suites (cd js && $node --import ./record.js --test --test-concurrency=$workers --test-reporter=spec --test-reporter-destination=stdout --test-reporter=junit --test-reporter-destination=$results/js.xml *.test.js);"
        ;;
    daemon) ;;
    *) fail "no suite is called $suite: python, js or daemon" ;;
    esac
    files="$files $suite=$results/$suite.xml"
done
# A check of this script itself, counted like the suites' own.
check() {
    name=$1
    shift
    if "$@"; then
        echo "<testsuite><testcase name=\"$name\"/></testsuite>" >"$results/$name.xml"
    else
        echo "<testsuite><testcase name=\"$name\"><failure/></testcase></testsuite>" >"$results/$name.xml"
        status=1
    fi
    files="$files $name=$results/$name.xml"
}

if [ -n "$sdk_suites" ]; then
    # The suites' own failures are in their files; what is checked here is the daemon's life.
    check lifecycle "$venv/bin/python" -m support.with_daemon -- sh -c "$sdk_suites exit 0"
fi
case " $suites " in
*" daemon "*)
    # One daemon at a time runs on the data directory, so these run one after another.
    (cd daemon && "$venv/bin/pytest" -q -p no:cacheprovider --junitxml="$results/daemon.xml" ${PYTEST_ARGS:-}) || status=1
    ;;
esac

echo
check leaks env NIDUS_DATA_DIR="$NIDUS_TEST_DATA_DIR" "$repo/scripts/leakcheck.sh" compare "$results/host-before"
[ -n "${NIDUS_WRITE_TABLES:-}" ] && "$venv/bin/python" -m support.tables "$results/tried"
echo "took $(($(date +%s) - started)) s"
# shellcheck disable=SC2086 # one argument per suite
"$venv/bin/python" -m support.summary $files || status=1
exit $status
