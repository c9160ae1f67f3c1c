#!/bin/busybox sh
# The first process of the tests' guest: writes numbered records to every disk, all the time.
#
# The kernel's command line arrives as environment: bf_disks (vda,vdb), bf_run, bf_first, bf_slots, bf_batch and
# bf_block (the region's start in blocks of 4096 bytes). The second serial port carries the protocol: "ACK disk N"
# (records up to N are flushed), "IOERROR disk N" (tried again until it works), "FOUND disk N" (with bf_resume: N is the
# newest record that is on the disk, and the next is written next), "DIED disk STATUS" (nobody writes to it any more),
# "stop", answered by "STOPPED", and "off": it finishes what it writes and powers off, as it does when its power button is
# pressed (ACPI).
# Records are built by the shell itself: a batch costs one fork. With bf_pause (seconds, 0.05) a disk rests that long
# between two batches: under TCG a guest that never rests takes two processors from whoever looks at it.
#
# With bf_agent=1 there is an ext4 on every disk, the records are in the file /DISK/records at the same offsets, and
# qemu-guest-agent runs.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in /modules/*.ko; do busybox insmod "$module"; done
exec 3<>/dev/ttyS1
busybox stty raw -echo <&3
busybox mkfifo /nothing
exec 4<>/nothing

dots=...............................................................
newline='
'

# --- file systems and the guest agent ---

mount_disk() {
    busybox mkdir "/$1"
    busybox mount -t ext4 "/dev/$1" "/$1"
}

run_agent() {
    busybox mkdir -p /run
    # There is one port; devtmpfs knows it by its number, its name is udev's doing.
    until [ -c "$1" ]; do
        set -- /dev/vport*
        busybox usleep 10000
    done
    # One that is told to end comes back.
    while :; do qemu-ga -m virtio-serial -p "$1" -t /run; done
}

# --- records ---

write_records() {
    disk=$1
    n=$bf_first
    while [ ! -b "/dev/$disk" ]; do busybox usleep 10000; done
    place=/dev/$disk
    [ -z "$bf_agent" ] || { mount_disk "$disk" && place=/$disk/records; }
    if [ -n "$bf_resume" ]; then
        newest=$(dd if="$place" bs=4096 skip="$bf_block" count="$bf_slots" iflag=direct 2>/dev/null |
            busybox grep -a -o "^blockferry $bf_run $disk [0-9]*" | busybox sort -n -k 4 | busybox tail -n 1)
        if [ -n "$newest" ]; then
            echo "FOUND $disk ${newest##* }" >&3
            n=$((${newest##* } + 1))
        fi
    fi
    while [ ! -e /stop ]; do
        last=$((n + bf_batch - 1))
        i=$n
        batch=
        while [ "$i" -le "$last" ]; do
            line="blockferry $bf_run $disk $i $dots"
            line="${line:0:63}$newline"
            line=$line$line$line$line
            line=$line$line$line$line
            batch=$batch$line$line$line$line
            i=$((i + 1))
        done
        printf %s "$batch" >"/batch-$disk"
        until dd if="/batch-$disk" of="$place" bs=4096 seek=$((bf_block + n % bf_slots)) conv=notrunc,fsync oflag=direct 2>"/error-$disk"; do
            echo "IOERROR $disk $n" >&3
            busybox cat "/error-$disk"
            busybox usleep 100000
        done
        echo "ACK $disk $last" >&3
        n=$((last + 1))
        # The shell's own wait costs no fork: on a pipe in which there never is anything.
        [ -z "$bf_pause" ] || read -r -t "$bf_pause" _ <&4
    done
    : >"/done-$disk"
}

# A writer that is killed, or crashes, would be missed by nobody in here.
keep_writing() {
    (write_records "$1") || {
        died="DIED $1 $?"
        busybox dmesg | busybox tail -n 20 # to the console, before whoever waits reads it
        echo "$died" >&3
    }
}

# Not `wait`: that would also wait for the power button.
finish() {
    : >/stop
    IFS=,
    for disk in $bf_disks; do
        while [ ! -e "/done-$disk" ]; do busybox usleep 10000; done
    done
    unset IFS
}

power_off() {
    finish
    busybox poweroff -f
}

# The first input event of the power button, whichever device that is.
await_button() {
    button=
    # Copied: the shell polls before it reads, and that file has nothing new to poll for.
    busybox cat /proc/bus/input/devices >/inputs
    while read -r kind words; do
        case "$kind $words" in
        N:*Power\ Button*) button=yes ;;
        H:*) [ -z "$button" ] || break ;;
        esac
    done </inputs
    for word in $words; do
        case $word in event*) dd if="/dev/input/$word" of=/dev/null bs=24 count=1 2>/dev/null && power_off ;; esac
    done
}

[ -z "$bf_agent" ] || run_agent &
await_button &
IFS=,
for disk in $bf_disks; do keep_writing "$disk" & done
unset IFS
while read -r word <&3; do
    case $word in
    stop) break ;;
    off) power_off ;;
    esac
done
finish
echo STOPPED >&3
while :; do busybox sleep 86400; done
