#!/usr/bin/env bash
# A real Slurm on this one machine, as root, without systemd and cgroups: slurm.sh up|down DIR [PORT].
# Two slurmd "nodes", n1 and n2, each on its own loopback port; nothing listens beyond loopback.
# Needs the Debian packages munge slurmctld slurmd slurm-client.
set -euo pipefail
action=$1 dir=$2 base=${3:-16800} num_nodes=2
export SLURM_CONF=$dir/slurm.conf

down() {
    if [ -s "$dir/run/slurmctld.pid" ]; then  # without it the clients would wait for minutes
        timeout 5 scancel --user=root || true
        for _ in $(seq 1 20); do [ -z "$(timeout 5 squeue -h)" ] && break; sleep 0.5; done
    fi
    for name in slurmd.n1 slurmd.n2 slurmctld munged; do
        [ -s "$dir/run/$name.pid" ] || continue
        pid=$(cat "$dir/run/$name.pid")
        # A stale pid file must not cost a stranger his life.
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${name%%.*}" ] || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 1 25); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
    done
}
if [ "$action" = down ]; then down; exit 0; fi

host=$(hostname -s) memory=$(awk '/MemTotal/{print int($2/2048)}' /proc/meminfo)
mkdir -p "$dir"/munge "$dir"/state "$dir"/log "$dir"/run "$dir"/spool/n1 "$dir"/spool/n2
chmod 755 "$dir" "$dir/munge"
(umask 077; head -c 1024 /dev/urandom > "$dir/munge/munge.key")
# CgroupPlugin: slurmd looks for a cgroup filesystem otherwise, and dies without one.
echo 'CgroupPlugin=cgroup/v1' > "$dir/cgroup.conf"
# cred_expire: a job that is requeued waits this long (121 s by default).
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/munge.socket,cred_expire=8
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=100000,batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
InactiveLimit=0
KillWait=10
MinJobAge=3600
MessageTimeout=30
NodeName=n[1-$num_nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((base + 11))-$((base + 10 + num_nodes))] CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
munged --key-file="$dir/munge/munge.key" --socket="$dir/munge/munge.socket" --num-threads=2 \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/munge.seed"
slurmctld -c
for i in $(seq 1 $num_nodes); do slurmd -c -N "n$i"; done
for _ in $(seq 1 60); do
    [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = "$num_nodes" ] && exit 0
    sleep 0.5
done
echo "slurm.sh: nodes are not idle after 30 s" >&2
tail -n 20 "$dir"/log/*.log >&2
down
exit 1
