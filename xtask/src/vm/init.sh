#!/bin/sh
# The guest's first and only script: makes the file systems that tracing needs, runs the live tests, and turns itself off.
# What it says itself begins with `vm: `, for the host to read.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /tmp
ip link set lo up
for module in /modules/*.ko; do
    insmod "$module" || echo "vm: can't load $module"
done
echo "vm: kernel $(uname -r)"
export TCPSTATE_BIN=/bin/tcpstate
# The machine is nobody else's: its clocks may be set.
export TCPSTATE_GUEST=1
/bin/tcpstate check -o json | sed 's/^/vm: check /'
# An argument or a variable a line.
while read -r line; do
    case $line in
        TCPSTATE_*) export "$line" ;;
        *) set -- "$@" "$line" ;;
    esac
done < /settings
/bin/live "$@" 2>&1
echo "vm: status $?"
[ -f /tmp/events ] && sed "s/^/vm: event /" /tmp/events
poweroff -f
