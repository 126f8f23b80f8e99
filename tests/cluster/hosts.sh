#!/usr/bin/env bash
# Real hosts on this one machine: hosts.sh up|down|name DIR, hosts.sh sweep. Each of h1 and h2 has network, process, host
# name, mount and IPC namespaces of its own, its own sshd, /etc/hosts, ~/.ssh and /dev/shm; the
# file system is otherwise shared, like NFS. The bridge between them lives in a namespace too, so
# that this machine's network is not touched. DIR/on HOST COMMAND... runs a command on a host.
# `name` prints the prefix of the namespaces of DIR. `sweep` removes the hosts of dead processes: whoever
# runs `up` holds a lock on $owners/PREFIX meanwhile, which the kernel releases when the process dies.
# Needs root and the Debian packages iproute2 openssh-server openssh-client pdsh hostname.
set -euo pipefail
action=$1 dir=${2:-} network=10.78.0 owners=/run/clue-ds-hosts
prefix=clue$((0x$(cksum <<< "$dir" | cut -c1-4)))

sweep() {
    for path in /run/netns/clue[0-9]*-*; do
        [ -e "$path" ] || continue
        name=${path##*/} owner=$owners/$(basename "${path%%-*}")
        pids=$(ip netns pids "$name" 2>/dev/null || true)
        if [ -e "$owner" ]; then
            flock -n "$owner" true || continue
            # Nobody but these tests starts anything in a namespace of this name.
            [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
        elif [ -n "$pids" ]; then
            continue
        fi
        ip netns del "$name" 2>/dev/null || true
    done
    for owner in "$owners"/clue[0-9]*; do
        [ -e "$owner" ] && flock -n "$owner" rm -f "$owner" || true
    done
}
if [ "$action" = sweep ]; then sweep; exit 0; fi
if [ "$action" = name ]; then echo "$prefix"; exit 0; fi

down() {
    for host in h1 h2; do
        [ -s "$dir/$host.pid" ] || continue
        pid=$(cat "$dir/$host.pid")
        # Only if the process still is that host's init; ending it ends everything in the host.
        tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null | grep -q "$dir/init_$host.sh" && kill -9 "$pid"
        rm -f "$dir/$host.pid"
    done
    for name in h1 h2 switch; do ip netns del "$prefix-$name" 2>/dev/null || true; done
}
if [ "$action" = down ]; then down; exit 0; fi

mkdir -p "$dir/ssh" /run/sshd
chmod 700 "$dir/ssh"
ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/id_ed25519"
ssh-keygen -q -t ed25519 -N '' -f "$dir/host_key"
cp "$dir/ssh/id_ed25519.pub" "$dir/ssh/authorized_keys"
printf 'Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n' > "$dir/ssh/config"
chmod 600 "$dir/ssh/config" "$dir/ssh/authorized_keys"
printf '127.0.0.1 localhost\n%s.1 h1\n%s.2 h2\n' $network $network > "$dir/hosts"
printf '#!/bin/sh\nh=$1; shift\nexec nsenter -t "$(cat %s/$h.pid)" -n -u -m -p -i --wd="$PWD" -- "$@"\n' "$dir" > "$dir/on"
chmod +x "$dir/on"

ip netns add "$prefix-switch"
ip -n "$prefix-switch" link add br0 type bridge
ip -n "$prefix-switch" link set br0 up
for i in 1 2; do
    host=h$i ns=$prefix-h$i
    ip netns add "$ns"
    ip -n "$ns" link set lo up
    ip -n "$prefix-switch" link add "port$i" type veth peer name eth0 netns "$ns"
    ip -n "$prefix-switch" link set "port$i" master br0 up
    ip -n "$ns" addr add "$network.$i/24" dev eth0
    ip -n "$ns" link set eth0 up
    cat > "$dir/sshd_$host.conf" <<CONF
ListenAddress $network.$i:22
HostKey $dir/host_key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
AuthorizedKeysFile $HOME/.ssh/authorized_keys
UseDNS no
CONF
    cat > "$dir/init_$host.sh" <<CONF
mount --make-rprivate /
hostname $host
mount --bind $dir/hosts /etc/hosts
mkdir -p $HOME/.ssh && mount --bind $dir/ssh $HOME/.ssh
mount -t tmpfs -o size=1g tmpfs /dev/shm
/usr/sbin/sshd -D -e -f $dir/sshd_$host.conf &
while :; do wait; sleep 1; done      # the first process of a host reaps orphans
CONF
    # --kill-child ends the host if unshare dies.
    setsid ip netns exec "$ns" unshare --uts --pid --mount --ipc --fork --mount-proc --kill-child \
        bash "$dir/init_$host.sh" </dev/null >"$dir/$host.log" 2>&1 &
    parent=$!
    for _ in $(seq 1 50); do
        child=$(cut -d' ' -f1 "/proc/$parent/task/$parent/children" 2>/dev/null || true)
        [ -n "$child" ] && break
        sleep 0.1
    done
    echo "$child" > "$dir/$host.pid"
done
for host in h1 h2; do
    for _ in $(seq 1 50); do
        [ "$("$dir/on" h1 ssh "$host" hostname 2>/dev/null)" = "$host" ] && continue 2
        sleep 0.2
    done
    echo "hosts.sh: $host does not answer ssh" >&2
    cat "$dir"/h?.log >&2
    down
    exit 1
done
