#!/usr/bin/env bash
# Unpack the distribution's cloud kernel and its modules into a directory, for the guests that the tests boot.
#
#   scripts/guest-kernel.sh [DIR]       DIR is .cache/kernel unless told; prints the kernel's path when done
#
# The package comes from the machine's own apt sources; nothing on the machine is changed and root is not needed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${1:-$root/.cache/kernel}
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
if ! compgen -G "$dest/boot/vmlinuz-*" >/dev/null; then
    meta=linux-image-cloud-$(dpkg --print-architecture)
    package=$(apt-cache depends --important "$meta" | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}')
    if [ -z "$package" ]; then
        echo "$0: apt knows no package $meta; run: apt-get update" >&2
        exit 1
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work" "$dest/unpacking"' EXIT
    # apt may download as its own user; where it cannot write here it says so and downloads as the caller.
    (cd "$work" && apt-get -q download "$package" >&2)
    rm -rf "$dest/unpacking"
    mkdir "$dest/unpacking"
    dpkg-deb -x "$work"/*.deb "$dest/unpacking"
    # Modules first: the kernel's presence says that all is there.
    rm -rf "$dest/lib" "$dest/boot"
    mv "$dest/unpacking/lib" "$dest/lib"
    mv "$dest/unpacking/boot" "$dest/boot"
fi
echo "$dest"/boot/vmlinuz-*
