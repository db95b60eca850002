#!/bin/sh
# Prepares the end-to-end jobs of the test bed (crates/testbed/jobs.toml) on the host, where there is a
# network: the official SDK for the machine's Python, and the guest's kernel and root file system. The last
# line of its output is the directory with python/, kernels/ and rootfs.ext4.
#
#   testbed-base.sh NIDUS      the program of this checkout
#
# The directory is in the test bed's cache, under a name that depends on what it is made of.
set -eu

nidus=$1
repo=$(cd "$(dirname "$0")/.." && pwd)
cache=${NIDUS_TESTBED_DIR:-/var/cache/nidus-testbed}
machine_python=3.11

venv=$("$repo/scripts/python-env.sh")

key=$(cat "$repo"/crates/template/src/rootfs.rs "$repo"/crates/template/src/image.rs \
    "$repo"/crates/template/src/kernel.rs "$repo"/conformance/python/*.txt "$0" | sha256sum | cut -c1-12)
dir=$cache/base-$key
work=$cache/.base-$key
mkdir -p "$cache"
exec 9>"$cache/base.lock"
flock 9
if [ ! -d "$dir" ]; then
    rm -rf "$cache"/base-*/ "$cache"/.base-*/
    echo "testbed: making the guest's kernel and root file system in $cache (once)" >&2
    "$nidus" fetch "$work" >&2
    # For the machine's Python, whatever this host's is.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --target "$work/python" \
        --python-version "$machine_python" --only-binary :all: \
        -r "$repo/conformance/python/requirements.txt" -c "$repo/conformance/python/constraints.txt" >&2
    mv "$work" "$dir"
fi
echo "$dir"
