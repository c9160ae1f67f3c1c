#!/usr/bin/env bash
# Unpack QEMU 10 from the distribution's backports into a directory, beside the distribution's own QEMU.
#
#   scripts/qemu10.sh [DIR]       DIR is .cache/qemu10 unless told; prints the wrapper's folder when done
#
# The machine's own package sources say where packages come from: the backports suite is added to a copy
# of them, in a private apt state, so nothing on the machine is changed and no host is named here.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${1:-$root/.cache/qemu10}
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
if [ -x "$dest/bin/qemu-system-x86_64" ] && "$dest/bin/qemu-system-x86_64" --version >/dev/null 2>&1; then
    echo "$dest/bin"
    exit 0
fi

. /etc/os-release
suite=$VERSION_CODENAME
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/sources.d" "$work/debs"
# Only stanzas and lines that speak of this suite: other vendors' sources have no backports.
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ -e "$f" ] || continue
    case $f in
        *.list | */sources.list) sed -n "/ $suite\(-updates\)\? /{p;s/ $suite\(-updates\)\? / $suite-backports /p}" "$f" >"$work/sources.d/$(basename "$f" .list)-own.list" ;;
        *.sources) sed -e "s/^\(Suites:.* \)\?\($suite-updates\)\(.*\)$/\1\2 $suite-backports\3/" "$f" | grep -v '^#' >"$work/sources.d/$(basename "$f")" ;;
    esac
done
apt=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache::archives=$work/archives" -o Dir::Etc::sourcelist=/dev/null
    -o "Dir::Etc::sourceparts=$work/sources.d" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o APT::Get::List-Cleanup=0)
apt-get "${apt[@]}" update >&2
(
    cd "$work/debs"
    names=$(apt-get "${apt[@]}" -s -t "$suite-backports" --no-install-recommends install qemu-system-x86 qemu-utils |
        awk '/^Inst /{print $2}' | grep -vE '^(libc6|libc-bin|perl.*|systemd.*)$' | sort -u)
    # What is installed already in the backports' version would not be listed: ask for these by name always.
    for p in qemu-system-x86 qemu-system-common qemu-system-data qemu-utils seabios ipxe-qemu; do names="$names $p"; done
    # shellcheck disable=SC2086  # a list of package names
    apt-get "${apt[@]}" -t "$suite-backports" download $(echo $names | tr ' ' '\n' | sort -u) >&2
    for deb in *.deb; do dpkg-deb -x "$deb" "$dest/root"; done
)
mkdir -p "$dest/bin"
for tool in qemu-system-x86_64 qemu-img qemu-nbd qemu-io qemu-storage-daemon; do
    data=''
    [ "$tool" = qemu-system-x86_64 ] && data=" -L '$dest/root/usr/share/qemu' -L '$dest/root/usr/share/seabios'"
    cat >"$dest/bin/$tool" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$dest/root/usr/lib/$(uname -m)-linux-gnu':'$dest/root/lib/$(uname -m)-linux-gnu' QEMU_MODULE_DIR='$dest/root/usr/lib/$(uname -m)-linux-gnu/qemu' exec '$dest/root/usr/bin/$tool'$data "\$@"
WRAPPER
    chmod 755 "$dest/bin/$tool"
done
"$dest/bin/qemu-system-x86_64" --version >&2
echo "$dest/bin"
