#!/usr/bin/env bash
# A real SLURM on this one machine, to try jobs and to test them: slurmctld and two nodes of two CPUs each, as root.
#
#   apt-get install slurm-wlm munge
#   eval "$(scripts/slurm/cluster.sh start)"     then sinfo, sbatch, srun, squeue work in this shell
#   scripts/slurm/cluster.sh stop                ends the daemons and removes what they kept
set -euo pipefail

ROOT=${SLURM_ROOT:-/tmp/litdistill-slurm}
export SLURM_CONF=$ROOT/slurm.conf
HOST=$(hostname -s)
PORT=${SLURM_PORT:-17000}

configure() {
  mkdir -p "$ROOT"/{state,log} /run/munge
  [ -f /etc/munge/munge.key ] || mungekey --create
  chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
  cat > "$SLURM_CONF" <<CONF
ClusterName=litdistill
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=15
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool-%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
NodeName=n1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=1:00:00 State=UP
CONF
}

case ${1:-} in
  start)
    configure
    munge -n > /dev/null 2>&1 || setsid su -s /bin/sh munge -c /usr/sbin/munged
    # setsid and >/dev/null: whoever waits for this script's output does not wait for the daemons.
    setsid slurmctld > /dev/null 2>&1
    for node in n1 n2; do setsid slurmd -N $node > /dev/null 2>&1; done
    for _ in $(seq 60); do
      [ "$(sinfo --noheader --format=%T 2> /dev/null | sort -u)" = idle ] && { echo "export SLURM_CONF=$SLURM_CONF MASTER_ADDR=127.0.0.1"; exit; }
      sleep 0.5
    done
    sinfo; tail -n 5 "$ROOT"/log/*.log
    exit 1 ;;
  stop)
    scancel --user="$(id -un)" 2> /dev/null || true
    for _ in $(seq 40); do [ -n "$(squeue --noheader 2> /dev/null)" ] || break; sleep 0.5; done
    for daemon in slurmd-n1 slurmd-n2 slurmctld; do
      [ ! -f "$ROOT/$daemon.pid" ] || kill "$(cat "$ROOT/$daemon.pid")" 2> /dev/null || true
    done
    sleep 1
    rm -rf "$ROOT" ;;
  *) sed -n '2,6s/^# \?//p' "$0"; exit 2 ;;
esac
