#!/usr/bin/env bash
# Installs what Nidus needs and is missing, from the system's package registry. Quick when all is there.
set -euo pipefail

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "run it as root (sudo make $*): namespaces, cgroups and package installation need it"
command -v apt-get >/dev/null || die "this script knows Debian's apt-get only; install the programs that 'nidus doctor' names by hand"
command -v cargo >/dev/null || die "Rust is missing: install a stable toolchain (1.90 or newer) with rustup, then run this again"

export DEBIAN_FRONTEND=noninteractive
updated=
update() { [ -n "$updated" ] || { say "reading package lists"; apt-get update -qq >/dev/null; updated=1; }; }

wanted=()
need() { # program package
    command -v "$1" >/dev/null 2>&1 || wanted+=("$2")
}
need nft nftables
need ip iproute2
need mmdebstrap mmdebstrap
need mke2fs e2fsprogs
need dpkg-deb dpkg
need xz xz-utils
need cc build-essential
need make make
need python3 python3
need curl curl
need openssl openssl
need qemu-img qemu-utils
need qemu-nbd qemu-utils
need nbdkit nbdkit
# For the tests of images: a registry, and the smallest system to fill it with.
need docker-registry docker-registry
need zstd zstd
# For the tests of the store on Postgres: the server's programs alone. No cluster is made, and none is started.
if [ ! -d /usr/lib/postgresql ]; then
    if [ ! -e /etc/postgresql-common ]; then
        mkdir -p /etc/postgresql-common/createcluster.d
        printf 'create_main_cluster = false\n' >/etc/postgresql-common/createcluster.d/nidus.conf
    fi
    wanted+=(postgresql)
fi
[ -x /bin/bash-static ] || wanted+=(bash-static)
need busybox busybox-static
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || wanted+=(libc6-dev)
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || wanted+=(debian-archive-keyring)
python3 -c 'import venv, ensurepip' 2>/dev/null || wanted+=(python3-venv)
need node nodejs
need npm npm
if [ ${#wanted[@]} -gt 0 ]; then
    update
    say "installing ${wanted[*]}"
    apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
fi

# QEMU 8.2 or newer: older ones cannot map a read-only memory file as private RAM.
qemu_ok() {
    local v
    v=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.*version \([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
    [ -n "$v" ] && [ "$(printf '%s\n8.2\n' "$v" | sort -V | head -n 1)" = 8.2 ]
}
if ! qemu_ok; then
    update
    candidate=$(apt-cache policy qemu-system-x86 | sed -n 's/^  Candidate: \([0-9]*:\)\{0,1\}\([0-9]*\.[0-9]*\).*/\2/p')
    if [ "$(printf '%s\n8.2\n' "${candidate:-0}" | sort -V | head -n 1)" = 8.2 ]; then
        say "installing qemu-system-x86"
        apt-get install -y -qq --no-install-recommends qemu-system-x86 >/dev/null
    else
        # The release's own is too old. Its backports suite lies beside it, under the same address.
        . /etc/os-release
        suite=${VERSION_CODENAME:?this system does not say its code name}-backports
        if ! apt-cache policy | grep -q "n=$suite"; then
            uri=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
                awk -v c="$VERSION_CODENAME" '$1 == c { print $2; exit }')
            [ -n "$uri" ] || die "no package source for $VERSION_CODENAME was found; add $suite by hand"
            say "adding the suite $suite"
            printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
                "$uri" "$suite" >/etc/apt/sources.list.d/nidus-backports.sources
            apt-get update -qq >/dev/null
        fi
        say "installing qemu-system-x86 from $suite"
        apt-get install -y -qq --no-install-recommends -t "$suite" qemu-system-x86 >/dev/null
    fi
    qemu_ok || die "QEMU 8.2 or newer could not be installed; see 'qemu-system-x86_64 --version'"
fi
say "everything is there ($(qemu-system-x86_64 --version | head -n 1))"
