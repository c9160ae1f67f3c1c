#!/bin/busybox sh
# The first process of the benchmark's guest: writes so much a second to every disk, past its cache.
#
# The kernel's command line arrives as environment: bf_disks (vda,vdb), bf_writes (of 64 KiB to each disk, every fifth of a
# second) and bf_span (how many of these a disk is long: from there on it begins again). A disk's name on the second serial
# port says that its first ones were written. One who is late is not made good: what the storage slows down is missing.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in /modules/*.ko; do busybox insmod "$module"; done

# Hundredths of a second since the boot, in `now`.
look() {
    read -r now _ </proc/uptime
    now=${now%.*}${now#*.}
}

write_paced() {
    unset IFS
    while [ ! -b "/dev/$1" ]; do busybox usleep 10000; done
    look
    next=$now
    at=0
    while :; do
        dd if=/pattern of="/dev/$1" bs=65536 count="$bf_writes" seek="$at" oflag=direct conv=notrunc 2>/dev/null
        [ "$at" -ne 0 ] || echo "$1" >/dev/ttyS1
        at=$(((at + bf_writes) % (bf_span - bf_writes)))
        next=$((next + 20))
        look
        if [ "$now" -lt "$next" ]; then busybox usleep $(((next - now) * 10000)); else next=$now; fi
    done
}

dd if=/dev/urandom of=/pattern bs=65536 count="$bf_writes" 2>/dev/null
IFS=,
for disk in $bf_disks; do write_paced "$disk" & done
unset IFS
while :; do busybox sleep 86400; done
