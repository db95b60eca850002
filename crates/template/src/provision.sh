# Installs what a sandbox needs and this system lacks, by the system's own package manager. Run as root before the
# snapshot of an image from a registry. Without bash nothing works; without the rest something is missed.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
has() { command -v "$1" >/dev/null 2>&1; }
missing=
for program in bash sudo curl ss pgrep tar; do has "$program" || missing="$missing $program"; done
[ -f /etc/ssl/certs/ca-certificates.crt ] || [ -f /etc/pki/tls/certs/ca-bundle.crt ] || missing="$missing certificates"
[ -n "$missing" ] || exit 0
names() {
    for m in $missing; do
        case "$m" in
            ss) echo "$1" ;;
            pgrep) echo "$2" ;;
            certificates) echo ca-certificates ;;
            *) echo "$m" ;;
        esac
    done
}
if has apt-get; then
    install() { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(names iproute2 procps) && apt-get clean; }
elif has apk; then
    install() { apk add --no-cache $(names iproute2 procps); }
elif has dnf; then
    install() { dnf install -y -q $(names iproute procps-ng); }
elif has pacman; then
    install() { pacman -Sy --noconfirm --needed $(names iproute2 procps-ng); }
elif has zypper; then
    install() { zypper -n install $(names iproute2 procps); }
else
    install() { false; }
fi
echo "the image lacks$missing: installing"
if ! install >/tmp/nidus-provision 2>&1; then
    tail -n 2 /tmp/nidus-provision
    echo "not all of$missing could be installed"
fi
rm -f /tmp/nidus-provision
if ! has bash; then
    echo "the image has no bash, by which commands of sandboxes are run, and none could be installed" >&2
    exit 1
fi
[ -x /bin/bash ] || ln -s "$(command -v bash)" /bin/bash
