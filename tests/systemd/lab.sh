#!/usr/bin/env bash
# A machine to throw away: systemd as process 1 in namespaces of its own, over a copy-on-write view of this machine.
#
#   lab.sh serve          boot, print the process id of the lab's systemd, run until standard input ends, power off
#   lab.sh run PID CMD..  run CMD in all namespaces of the lab whose systemd has this id; exit status is CMD's
#
# LAB_DIR      an empty directory for the state (needed by serve)
# LAB_PROJECT  this project; copied to the same path in the lab where it lies in /tmp or on another file system than /
# LAB_ROOT     root file system to look at (default: /). Another release: debootstrap --variant=minbase
#              --include=systemd,systemd-sysv,dbus,make,python3,python3-venv SUITE DIR, then LAB_ROOT=DIR
#
# The root file system is an overlay: this machine's files below, a tmpfs above. Everything written in the lab goes into
# the tmpfs and is gone with it; nothing of this machine is written but LAB_DIR and a cgroup, removed at the end.
# The lab sees no process, no network and no device of this machine. Ended are only processes whose ids are known from
# starting them; the lab's process 1 takes with it whatever runs inside.
#
# Exit status 77: this machine cannot do it, and the reason is on standard error.
#
# What has no effect in it, because this machine keeps it for itself: memory, CPU and task limits where cgroup v1 holds
# those controllers; LimitNOFILE above this machine's hard limit without CAP_SYS_RESOURCE.
set -euo pipefail

SELF=$(readlink -f "$0")
SYSTEMD=/lib/systemd/systemd
BOOT_LIMIT_S=30
STOP_LIMIT_S=15

say() { echo "lab: $*" >&2; }
impossible() { say "$*"; exit 77; }
fail() { say "$*"; exit 1; }

cgroup2() { findmnt --noheadings --types cgroup2 --output TARGET | head -n 1; }

require() {
    [ "$(id -u)" = 0 ] || impossible "needs root"
    local tool
    for tool in unshare nsenter findmnt setsid pivot_root; do
        command -v "$tool" >/dev/null || impossible "needs $tool (package util-linux)"
    done
    [ -x "${LAB_ROOT:-}$SYSTEMD" ] || impossible "needs systemd (package systemd)"
    [ -e "${LAB_ROOT:-}/usr/bin/dbus-daemon" ] || impossible "needs dbus-daemon (package dbus)"
    unshare --mount --pid --fork --net --uts --ipc --cgroup true 2>/dev/null || impossible "may not make namespaces (CAP_SYS_ADMIN)"
    [ -n "$(cgroup2)" ] || impossible "no cgroup2 file system is mounted"
    [ -w "$(cgroup2)/cgroup.procs" ] || impossible "cgroup2 is not writable"
    mkdir -p "$LAB_DIR/trial"
    unshare --mount bash -c 'mount -t tmpfs tmpfs "$1" && cd "$1" && mkdir u w r && mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w r' \
        bash "$LAB_DIR/trial" 2>/dev/null || impossible "cannot mount an overlay"
    rmdir "$LAB_DIR/trial"
}

device() { mknod -m 666 "$1" c "$2" "$3"; }

become_systemd() { # inside the new namespaces, as their process 1
    local root=$LAB_DIR/top/root unit
    mount -t tmpfs -o mode=755 tmpfs "$LAB_DIR/top"
    mkdir "$LAB_DIR"/top/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=${LAB_ROOT:-/},upperdir=$LAB_DIR/top/upper,workdir=$LAB_DIR/top/work" "$root"
    mkdir -p "$root"/{proc,sys,dev,run,tmp,mnt}
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount -t sysfs -o nosuid,nodev,noexec,ro sysfs "$root/sys" # read-only: systemd then leaves devices alone
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys" # this machine's settings stay this machine's
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
    mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
    device "$root/dev/null" 1 3
    device "$root/dev/zero" 1 5
    device "$root/dev/full" 1 7
    device "$root/dev/random" 1 8
    device "$root/dev/urandom" 1 9
    device "$root/dev/tty" 5 0
    ln -s /proc/self/fd "$root/dev/fd"
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,mode=620,ptmxmode=0666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
    # A copy, not a mount: an installed machine has no such mount, and a sandbox would be told wrong by it.
    if [ -n "${LAB_PROJECT:-}" ] && [ ! -e "$root$LAB_PROJECT/Makefile" ]; then
        tar -C / --exclude=.git --exclude=.venv --exclude='.*_cache' -cf - "${LAB_PROJECT#/}" | tar -C "$root" -xf -
    fi

    # A machine that has just been installed: no service but the journal and the bus, and no whaled yet.
    rm -rf "$root"/{etc,usr/lib,lib}/systemd/system/*.wants "$root"/etc/systemd/system/* "$root"/etc/rc?.d "$root/etc/fstab" \
        "$root"/{opt,etc,var/lib,var/lib/private}/whaled "$root/usr/local/bin/whaled" "$root/var/log/journal"
    for unit in sockets.target.wants/{systemd-journald.socket,systemd-journald-dev-log.socket,dbus.socket} \
        sysinit.target.wants/{systemd-journald.service,systemd-tmpfiles-setup.service}; do
        mkdir -p "$root/etc/systemd/system/${unit%/*}"
        ln -s "/lib/systemd/system/${unit##*/}" "$root/etc/systemd/system/$unit"
    done
    mkdir -p "$root/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/lab.conf"
    mkdir -p "$root/etc/tmpfiles.d"
    ln -sf /dev/null "$root/etc/tmpfiles.d/tmp.conf" # Debian empties /tmp at boot, and the project may be there
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    echo lab >"$root/etc/hostname"

    cd "$root"
    mkdir -p mnt/old
    pivot_root . mnt/old
    umount -l /mnt/old
    rmdir /mnt/old
    # systemd in a container leaves propagation as found, and LoadCredential= mounts in a child's namespace what must be
    # seen outside it: with private mounts the credentials' directory would be empty.
    mount --make-rshared /
    exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        "$SYSTEMD" --system --unit=multi-user.target --log-target=journal --show-status=no
}

enter() { # enter PID CMD..
    local pid=$1
    shift
    nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup --root --wd env -i container=lab HOME=/root TERM=dumb LANG=C.UTF-8 \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_PAGER= SYSTEMD_COLORS=0 "$@"
}

child_of() { # child_of PID: its first child, once it has one
    local child deadline=$((SECONDS + BOOT_LIMIT_S))
    while [ "$SECONDS" -lt "$deadline" ] && [ -d "/proc/$1" ]; do
        read -r child _ <"/proc/$1/task/$1/children" || true
        [ -z "${child:-}" ] || { echo "$child"; return; }
        sleep 0.01
    done
    return 1
}

await_boot() { # await_boot PID
    local deadline=$((SECONDS + BOOT_LIMIT_S))
    while [ "$SECONDS" -lt "$deadline" ] && [ -d "/proc/$1" ]; do
        case $(enter "$1" systemctl is-system-running 2>/dev/null || true) in
            running | degraded) return ;;
        esac
        sleep 0.02
    done
    return 1
}

power_off() {
    local deadline=$((SECONDS + STOP_LIMIT_S))
    trap - EXIT
    if [ -n "${systemd_pid:-}" ] && kill -s RTMIN+4 "$systemd_pid" 2>/dev/null; then # poweroff.target
        while [ -d "/proc/$systemd_pid" ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.02; done
    fi
    # Still there? --kill-child ends the lab's process 1 with its parent, and the kernel everything under that.
    [ -z "${parent_pid:-}" ] || { kill "$parent_pid" 2>/dev/null || true; wait "$parent_pid" 2>/dev/null || true; }
    [ -z "${group:-}" ] || until find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || [ ! -d "$group" ]; do
        [ "$SECONDS" -lt "$deadline" ] || { say "cgroup $group is still in use"; break; }
        sleep 0.02
    done
    rmdir "$LAB_DIR/top"
}

serve() {
    require
    trap '' INT # of a terminal: who started us ends us by closing our standard input
    trap power_off EXIT
    group=$(cgroup2)/whaled-lab-$$
    mkdir "$group" "$LAB_DIR/top"
    (
        echo "$BASHPID" >"$group/cgroup.procs" # before the namespace is made: this becomes the root the lab sees
        exec setsid unshare --fork --kill-child --pid --mount --uts --ipc --net --cgroup --propagation private "$SELF" __inside
    ) </dev/null >"$LAB_DIR/boot.log" 2>&1 &
    parent_pid=$!
    systemd_pid=$(child_of "$parent_pid") && await_boot "$systemd_pid" || { cat "$LAB_DIR/boot.log" >&2; fail "systemd did not come up"; }
    echo "$systemd_pid"
    cat >/dev/null # until standard input ends
}

case ${1:-} in
    serve) export LAB_DIR; serve ;;
    run) shift; enter "$@" ;;
    __inside) become_systemd ;;
    *) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$SELF"; exit 2 ;;
esac
