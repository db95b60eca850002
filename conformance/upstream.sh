#!/bin/sh
# Runs the test suites of E2B's own SDK repository against a nidus of this checkout.
#
#   conformance/upstream.sh CHECKOUT [python-sync] [python-async] [python-unit] [js]     all by default
#
# CHECKOUT is a clone of https://github.com/e2b-dev/E2B, brought by you: nothing of it is in this repository, and
# nothing in it is changed but what installing its dependencies makes (pnpm). Needs root, a build (make build), and
# Python 3.11 and Node 20 of `make setup`.
#
# The suites build templates of ubuntu:22.04 and e2bdev/base. Where no registry can be reached, set
# NIDUS_UPSTREAM_LOCAL=1: both names then stand for the Debian image that `nidus fetch` makes of packages.
#
# They are meant for a domain: names under nidus.test lead to this host while they run (dnsmasq, for them alone), with a
# certificate that they alone trust; the proxy listens on port 443 of 127.0.0.1, and TLS in front of the API on that of 127.0.0.2.
#
# Their limits of time are for E2B's cloud; here they are longer, since guests may be emulated. Results as JUnit are
# in target/upstream, each failure is named at the end, and docs/upstream.md says why those that are known fail.
set -u

repo=$(cd "$(dirname "$0")/.." && pwd)
here=$repo/conformance
fail() {
    echo "upstream: $*" >&2
    exit 1
}

[ $# -ge 1 ] || fail "usage: conformance/upstream.sh CHECKOUT [python-sync] [python-async] [python-unit] [js]"
checkout=$(cd "$1" 2>/dev/null && pwd) || fail "$1 is not a directory: git clone https://github.com/e2b-dev/E2B"
[ -d "$checkout/packages/python-sdk/tests" ] || fail "$checkout is no checkout of E2B's SDKs"
shift
suites=${*:-python-unit python-sync python-async js}
export NIDUS_BIN="${NIDUS_BIN:-$repo/target/release/nidus}"
export NIDUS_TEST_DATA_DIR="${NIDUS_TEST_DATA_DIR:-/var/lib/nidus-test}"
[ "$(id -u)" = 0 ] || fail "must be run as root (sandboxes need namespaces and taps)"
[ -x "$NIDUS_BIN" ] || fail "$NIDUS_BIN is not there; run 'make build' first"
venv=$("$repo/scripts/python-env.sh") || exit 1

# Their SDK, of the checkout, with what its tests need: beside ours.
theirs=$repo/.nidus/upstream-venv
if [ ! -x "$theirs/bin/pytest" ] || [ "$(cat "$theirs/.made-from" 2>/dev/null)" != "$checkout" ]; then
    echo "upstream: making $theirs (once)" >&2
    rm -rf "$theirs"
    "$venv/bin/python" -m venv "$theirs" || exit 1
    "$theirs/bin/pip" install --quiet --disable-pip-version-check "$checkout/packages/python-sdk" \
        'pytest>=9.0.3,<10' 'pytest-xdist>=3.3.1,<4' 'python-dotenv>=1,<2' 'pytest-dotenv>=0.5.2,<0.6' \
        'pytest-asyncio>=1.3,<2' 'pytest-timeout>=2.4,<3' || exit 1
    printf '%s' "$checkout" >"$theirs/.made-from"
fi

# A domain, in a mount namespace of the tests' own: resolver, certificates.
command -v dnsmasq >/dev/null || apt-get install -y -qq --no-install-recommends dnsmasq-base >/dev/null ||
    fail "dnsmasq is missing: apt-get install dnsmasq-base"
domain=nidus.test
net=$(mktemp -d)
trap '[ -e "$net/dns.pid" ] && kill "$(cat "$net/dns.pid")"; rm -rf "$net"' EXIT
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=nidus tests" -keyout "$net/ca.key" -out "$net/ca.pem" 2>/dev/null &&
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$domain" -CA "$net/ca.pem" -CAkey "$net/ca.key" \
        -addext basicConstraints=critical,CA:FALSE -addext "subjectAltName=DNS:$domain,DNS:*.$domain" \
        -keyout "$net/key.pem" -out "$net/cert.pem" 2>/dev/null || fail "openssl made no certificate"
cat /etc/ssl/certs/ca-certificates.crt "$net/ca.pem" >"$net/all.pem"
dnsmasq --conf-file=/dev/null --listen-address=127.0.0.153 --bind-interfaces --address="/$domain/127.0.0.1" --address="/api.$domain/127.0.0.2" \
    --resolv-file=/etc/resolv.conf --pid-file="$net/dns.pid" || fail "dnsmasq did not start"
echo "nameserver 127.0.0.153" >"$net/resolv.conf"
cat >"$net/inside.sh" <<END
mount --bind $net/resolv.conf /etc/resolv.conf && mount --bind $net/all.pem /etc/ssl/certs/ca-certificates.crt || exit 1
(cd $here && exec $venv/bin/python -m support.tls 127.0.0.2:443 $net/cert.pem $net/key.pem "\${E2B_API_URL##*:}") &
tls=\$!
trap 'kill \$tls' EXIT
unset E2B_API_URL E2B_SANDBOX_URL E2B_VOLUME_API_URL
export E2B_DOMAIN=$domain SSL_CERT_FILE=$net/all.pem REQUESTS_CA_BUNDLE=$net/all.pem NODE_EXTRA_CA_CERTS=$net/ca.pem
END
export NIDUS_TEST_INHERIT=1 NIDUS_DOMAIN=$domain NIDUS_PROXY_TLS_ADDR=127.0.0.1:443
export NIDUS_PROXY_TLS_CERT="$net/cert.pem" NIDUS_PROXY_TLS_KEY="$net/key.pem"

if [ -n "${NIDUS_UPSTREAM_LOCAL:-}" ]; then
    images=$NIDUS_TEST_DATA_DIR.images
    [ -e "$images/rootfs.ext4" ] || "$NIDUS_BIN" fetch "$images" || fail "the image of Debian's packages cannot be made"
    export NIDUS_LOCAL_IMAGES="ubuntu:22.04=$images/rootfs.ext4,e2bdev/base=$images/rootfs.ext4"
fi

out=$repo/target/upstream
rm -rf "$out"
mkdir -p "$out"
python="$checkout/packages/python-sdk"
run=""
for suite in $suites; do
    case $suite in
    python-unit) tests="--ignore=tests/sync --ignore=tests/async tests" ;;
    python-sync) tests=tests/sync ;;
    python-async) tests=tests/async ;;
    js)
        if [ ! -d "$checkout/packages/js-sdk/node_modules" ]; then
            (cd "$checkout" && npx -y pnpm@10 install --frozen-lockfile --filter e2b --config.engine-strict=false) || fail "the dependencies of the JS SDK cannot be installed"
        fi
        run="$run cd '$checkout/packages/js-sdk'; npx vitest run --project unit --project template --project connectionConfig --testTimeout=180000 --hookTimeout=180000 --maxWorkers=2 --reporter=default --reporter=junit --outputFile.junit=$out/js.xml;"
        continue
        ;;
    *) fail "no suite is called $suite: python-unit, python-sync, python-async or js" ;;
    esac
    run="$run cd '$python'; '$theirs/bin/pytest' -q -p no:cacheprovider -n 2 --timeout=300 --junitxml=$out/$suite.xml $tests;"
done

cd "$here" || exit 1
"$venv/bin/python" -m support.with_daemon -- unshare -m sh -c ". $net/inside.sh; $run exit 0"
files=""
for suite in $suites; do files="$files $suite=$out/$suite.xml"; done
# shellcheck disable=SC2086 # one argument per suite
"$venv/bin/python" -m support.summary $files
