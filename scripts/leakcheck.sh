#!/bin/sh
# Says what a run left behind on this host.
#
#   scripts/leakcheck.sh snapshot FILE   writes down what is there now
#   scripts/leakcheck.sh compare FILE    prints what is there now and was not then; exit 1 if anything
#
# Looked at: VMM, daemon and template-build processes, network namespaces (named and held by a process),
# mounts, nft tables, links, addresses, routes and rules, unix sockets, loop devices, cgroups, and
# files and directories of ours under /tmp, /run and the data directory's run folder.
#
# NIDUS_DATA_DIR (default /var/lib/nidus) names the data directory. A thing that is just going away
# gets LEAK_GRACE seconds (default 5) to be gone; it is asked again and again until then.
set -eu

data_dir=${NIDUS_DATA_DIR:-/var/lib/nidus}
grace=${LEAK_GRACE:-5}

usage() {
    sed -n '2,5p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
}

# One process a line: pid, its start time (so that a reused pid is another process) and its command.
processes() {
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        comm=$(cat "$dir/comm" 2>/dev/null) || continue
        case $comm in
        qemu-* | nidus | nidus-* | firecracker | mmdebstrap | debootstrap | mke2fs | virtiofsd) ;;
        *) continue ;;
        esac
        # A zombie has ended; it waits for its parent only, which is not ours to judge.
        state=$(sed 's/.*) //' "$dir/stat" 2>/dev/null | cut -d' ' -f1) || continue
        [ "$state" = Z ] && continue
        start=$(sed 's/.*) //' "$dir/stat" 2>/dev/null | cut -d' ' -f20) || continue
        args=$(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null | cut -c1-160) || continue
        # The test bed's outer machine runs other tests, perhaps at the same time.
        case $args in *nidus-testbed*) continue ;; esac
        printf 'process\t%s (started %s) %s\n' "$pid" "$start" "$args"
    done
}

network() {
    for name in /run/netns/* /var/run/netns/*; do
        [ -e "$name" ] && printf 'namespace\t%s\n' "${name##*/}"
    done
    if command -v ip >/dev/null; then
        ip -o link show | awk '{ sub(/@.*/, "", $2); sub(/:$/, "", $2); print "link\t" $2 }'
        ip -o addr show | awk '{ print "address\t" $2 " " $4 }'
        ip route show table all type unicast 2>/dev/null | awk '{ print "route\t" $0 }' | sed 's/ linkdown//;s/ *$//'
        ip rule show | sed 's/^/rule\t/'
    fi
    command -v nft >/dev/null && nft list tables 2>/dev/null | sed 's/^/nft\t/'
    return 0
}

storage() {
    awk '{ print "mount\t" $5 " (" $1 ")" }' /proc/self/mountinfo | sed 's/ ([0-9]*)$//'
    awk 'NF > 7 && $8 !~ /^@/ { print "socket\t" $8 }' /proc/net/unix | grep -Ei "nidus|qmp|nbd|$data_dir" || true
    if command -v losetup >/dev/null; then
        losetup -n -O NAME,BACK-FILE 2>/dev/null | sed 's/^/loop\t/'
    fi
    find /sys/fs/cgroup -maxdepth 6 -type d -name '*nidus*' 2>/dev/null | while read -r group; do
        find "$group" -type d | sed 's/^/cgroup\t/'
    done
    for place in /tmp /var/tmp /run /dev/shm; do
        find "$place" -maxdepth 1 \( -name '*nidus*' -o -name 'mmdebstrap*' -o -name 'qemu*' \) 2>/dev/null | sed 's/^/file\t/'
    done
    [ -d "$data_dir/run" ] && find "$data_dir/run" -mindepth 1 2>/dev/null | sed 's/^/file\t/'
    return 0
}

all() {
    { processes; network; storage; } | LC_ALL=C sort -u
}

[ $# -eq 2 ] || usage
case $1 in
snapshot)
    all >"$2"
    ;;
compare)
    [ -r "$2" ] || { echo "leakcheck: no snapshot at $2" >&2; exit 2; }
    end=$(($(date +%s) + grace))
    while :; do
        left=$(all | LC_ALL=C comm -13 "$2" -)
        [ -z "$left" ] && break
        [ "$(date +%s)" -ge "$end" ] && break
        sleep 0.2
    done
    if [ -n "$left" ]; then
        echo "left behind:"
        printf '%s\n' "$left" | sed 's/^/  /'
        exit 1
    fi
    echo "nothing left behind: no process, namespace, mount, nft table, link, socket, cgroup or file"
    ;;
*) usage ;;
esac
