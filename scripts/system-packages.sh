#!/usr/bin/env bash
# Install the system packages that are missing: as root or with sudo; else one line says what to install.
#
#   scripts/system-packages.sh demo     what `make demo` needs
#   scripts/system-packages.sh tests    and what the tests need on top
#   scripts/system-packages.sh bench    and what `make bench` needs on top, libvirt's side and XFS; starts no service
set -euo pipefail

what=${1:-demo}
packages=(python3-venv qemu-system-x86 qemu-utils busybox-static kmod util-linux)
# libvirt0 has the schemas that our XML is validated against; e2fsprogs makes file systems for guests, and checks them;
# xfsprogs makes one whose files can share blocks; the others are what the guest agent is linked with. gcc makes what is
# preloaded into programs whose storage is to fail or to be recorded; strace shows what was on disk when a command was sent. nbdkit is an NBD
# server that fails, delays and pauses.
[ "$what" = tests ] && packages+=(git gcc libc6-dev strace nbdkit libvirt0 e2fsprogs xfsprogs libglib2.0-0 libudev1 libnuma1 liburing2)
# The last three build libvirt-python.
[ "$what" = bench ] && packages+=(xfsprogs libvirt-daemon libvirt-daemon-driver-qemu libvirt-dev pkg-config gcc)

missing=()
for package in "${packages[@]}"; do
    # Any python3 with a venv module will do, the distribution's or another.
    [ "$package" = python3-venv ] && python3 -c 'import ensurepip, venv' 2>/dev/null && continue
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

sudo=()
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
        echo "blockferry: packages are missing; as root: apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    sudo=(sudo -n)
fi
echo "installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -q >&2
"${sudo[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
