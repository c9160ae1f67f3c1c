#!/usr/bin/env bash
# Unpack the distribution's qemu-guest-agent into a directory, for the guests that the tests boot.
#
#   scripts/guest-agent.sh [DIR]        DIR is .cache/agent unless told; prints the agent's path when done
#
# The package comes from the machine's own apt sources; nothing on the machine is changed and root is not needed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dest=${1:-$root/.cache/agent}
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
if [ ! -x "$dest/usr/sbin/qemu-ga" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work" "$dest/unpacking"' EXIT
    # apt may download as its own user; where it cannot write here it says so and downloads as the caller.
    (cd "$work" && apt-get -q download qemu-guest-agent >&2)
    rm -rf "$dest/unpacking"
    mkdir "$dest/unpacking"
    dpkg-deb -x "$work"/*.deb "$dest/unpacking"
    rm -rf "$dest/usr"
    mv "$dest/unpacking/usr" "$dest/usr"
fi
echo "$dest/usr/sbin/qemu-ga"
