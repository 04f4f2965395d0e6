#!/usr/bin/env bash
# A real Slurm of four nodes on this one Linux machine: for tests, and for trying a cluster config at home.
#
#   slurm/dev-cluster.sh up           start it, or heal it: what does not run is started (3 to 10 s)
#   slurm/dev-cluster.sh down         stop it and remove every trace, also after a half-done `up`
#   slurm/dev-cluster.sh status       daemons, nodes, queue; exit code 1 unless everything runs
#   slurm/dev-cluster.sh env          the line for `eval` that a shell needs beside another Slurm
#   slurm/dev-cluster.sh crash NODE   power a node off, its jobs with it, and tell Slurm at once
#   slurm/dev-cluster.sh boot NODE    power it on and put it back to work
#   slurm/dev-cluster.sh stop NAME    end one daemon and tell nobody: Slurm needs 15 to 30 s to notice a lost
#   slurm/dev-cluster.sh start NAME   node. NAME: munged mariadb slurmdbd slurmctld node1 node2 ...
#
# node1 to node4 have 4 CPUs, 4 GB and 2 make-believe GPUs each. Partitions: gpu (the default), cpu, and
# scavenge, whose jobs the other two preempt and requeue. `sacct` works where slurmdbd and MariaDB are
# installed; ACCT=none brings up a cluster without, ACCT=db insists on it.
#
# Needs root and the Debian packages below, no systemd; a container will do. Everything lives in
# $MEDTRAIN_DEV_CLUSTER (${TMPDIR:-/tmp}/medtrain-dev-cluster), but for marked lines in /etc/hosts and the
# link /etc/slurm/slurm.conf.
set -euo pipefail

PACKAGES="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge slurmdbd mariadb-server"
ROOT=${MEDTRAIN_DEV_CLUSTER:-${TMPDIR:-/tmp}/medtrain-dev-cluster}
FOLDERS=(etc run log munge state spool db)
NODES=(node1 node2 node3 node4)
DAEMONS=(slurmctld slurmdbd mariadb munged) # in the order they stop
MARK="# medtrain-dev-cluster $ROOT"
LINK=/etc/slurm/slurm.conf
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps the daemons, and not every shell looks
export SLURM_CONF=$ROOT/etc/slurm.conf

die() { echo "dev-cluster: $*" >&2; exit 1; }

# A process is known by number, start time and boot, so that neither a reused number nor a restart of the
# machine makes us signal a stranger.
stamp() {
  local start
  start=$(awk '$3 != "Z" {print $22}' "/proc/$1/stat" 2>/dev/null) && [[ -n $start ]] || return 1
  echo "$1 $start $(cat /proc/sys/kernel/random/boot_id 2>/dev/null || true)"
}
alive() {
  local record
  record=$(cat "$ROOT/run/$1" 2>/dev/null) && [[ $(stamp "${record%% *}") == "$record" ]]
}
any_alive() {
  local name
  for name in "${NODES[@]}" "${DAEMONS[@]}"; do ! alive "$name" || return 0; done
  return 1
}
spawn() { # spawn NAME COMMAND...: own session, clean environment, without our lock (fd 9)
  local name=$1; shift
  ! alive "$name" || return 0
  (cd / && exec setsid env -i PATH="$PATH" HOME=/root SLURM_CONF="$SLURM_CONF" \
    MYSQL_UNIX_PORT="$ROOT/db/socket" "$@") >>"$ROOT/log/$name.out" 2>&1 </dev/null 9>&- &
  stamp $! >"$ROOT/run/$name" || true
  disown
}
end() { # end NAME SIGNAL: and KILL after 10 s
  local pid
  if alive "$1"; then
    pid=$(cut -d' ' -f1 "$ROOT/run/$1")
    kill "-$2" "$pid" 2>/dev/null || true
    for _ in {1..100}; do alive "$1" || break; sleep 0.1; done
    ! alive "$1" || kill -KILL "$pid" 2>/dev/null || true
  fi
  rm -f "$ROOT/run/$1"
}
wait_for() { # wait_for SECONDS NAME COMMAND...: until COMMAND succeeds, as long as the daemon NAME lives
  local limit=$((SECONDS + $1)) name=$2 answer; shift 2
  until answer=$("$@" 2>&1); do
    if alive "$name" && ((SECONDS < limit)); then sleep 0.1; continue; fi
    die "$name does not answer; its logs are in $ROOT/log; \`$0 down\` cleans up.
${answer##*$'\n'}
$(cat "$ROOT/log/$name".{out,log} 2>/dev/null | grep -iE 'error|fatal' | tail -n 2)"
  done
}

# Its own UTS, PID and mount namespace makes a node a machine: it has a host name, and killing its first
# process kills all of them, as a power cut does. Where a container forbids that, nodes are plain daemons.
NAMESPACE=(unshare --uts --pid --mount --mount-proc --fork --kill-child)
have_namespaces() { "${NAMESPACE[@]}" hostname node0 2>/dev/null; }
is_node() { [[ " ${NODES[*]} " == *" ${1:-nobody} "* ]]; }
is_daemon() { [[ " ${DAEMONS[*]} " == *" ${1:-nobody} "* ]]; }

start_node() {
  mkdir -p "$ROOT/spool/$1"
  # bash stays on as the first process because somebody has to reap what jobs leave behind
  if have_namespaces; then spawn "$1" "${NAMESPACE[@]}" bash -c "hostname $1 && { slurmd -D -N $1 & wait \$!; }"
  else spawn "$1" slurmd -D -N "$1"; fi
}
stop_node() {
  local environ
  end "$1" KILL
  ! have_namespaces || return 0
  for environ in /proc/[0-9]*/environ; do # no namespace to take the jobs along: their environment tells
    ! grep -qzxF "SLURMD_NODENAME=$1" "$environ" || ! grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environ" ||
      kill -KILL "${environ//[^0-9]/}" || true
  done 2>/dev/null
}
node_state() { scontrol -o show node "$1" | sed -n 's/.* State=\([^ ]*\).*/\1/p'; }
registered() { local state; state=$(node_state "$1") && [[ $state != *"*"* && $state != *NOT_RESPONDING* ]]; }
usable() { [[ $(node_state "$1") =~ ^(IDLE|MIXED|ALLOCATED)(\+COMPLETING)?$ ]]; }
tell_down() { ! alive slurmctld || scontrol update nodename="$1" state=down reason="power cut"; }
boot() {
  # A node that is back before Slurm noticed would leave jobs that Slurm believes are running.
  alive "$1" || tell_down "$1"
  start_node "$1"
  alive slurmctld || return 0
  wait_for 20 "$1" registered "$1"
  ! usable "$1" || return 0
  sleep 2 # until requests to kill the dead node's jobs are through, or they hit those jobs' next run
  scontrol update nodename="$1" state=resume 2>/dev/null || true
  wait_for 20 "$1" usable "$1"
}

with_database() { grep -q ^AccountingStorage "$SLURM_CONF"; }
start_daemon() {
  case $1 in
    munged)
      spawn munged munged --foreground --force --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" \
        --pid-file="$ROOT/munge/pid" --seed-file="$ROOT/munge/seed" --log-file="$ROOT/log/munged.log"
      wait_for 10 munged munge -n -S "$ROOT/munge/socket" ;;
    mariadb)
      [[ -d $ROOT/db/data ]] || mariadb-install-db --no-defaults --user=root --datadir="$ROOT/db/data" \
        --skip-test-db >"$ROOT/log/mariadb-install.out" 2>&1 || die "no database: see $ROOT/log/mariadb-install.out"
      spawn mariadb mariadbd --no-defaults --user=root --datadir="$ROOT/db/data" --socket="$ROOT/db/socket" \
        --skip-networking --innodb-buffer-pool-size=128M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=2
      wait_for 30 mariadb mariadb --no-defaults --socket="$ROOT/db/socket" -e "select 1" ;;
    slurmdbd)
      spawn slurmdbd slurmdbd -D
      wait_for 30 slurmdbd sacctmgr -n show cluster
      [[ -n $(sacctmgr -n show cluster medtrain) ]] || sacctmgr -i add cluster medtrain >/dev/null ;;
    slurmctld)
      spawn slurmctld slurmctld -D
      wait_for 20 slurmctld scontrol show config ;;
  esac
}

check_programs() {
  local missing=() program programs=(slurmctld slurmd munged munge sbatch scontrol)
  [[ $ACCT == none ]] || programs+=(slurmdbd sacctmgr mariadbd mariadb-install-db mariadb)
  for program in "${programs[@]}"; do type "$program" >/dev/null 2>&1 || missing+=("$program"); done
  ((!${#missing[@]})) || die "not installed: ${missing[*]}. On Debian or Ubuntu:
  apt-get update && apt-get install -y --no-install-recommends $PACKAGES"
}
check_place() {
  local other
  [[ $ROOT =~ ^/[A-Za-z0-9._/-]{1,79}$ ]] || # slurm.conf knows no quotes, and a socket's path is short
    die "MEDTRAIN_DEV_CLUSTER must be an absolute path of at most 80 plain characters, not '$ROOT'"
  [[ -e $SLURM_CONF ]] || for other in "${FOLDERS[@]}"; do
    [[ ! -e $ROOT/$other ]] || die "$ROOT/$other exists and is not mine; choose another MEDTRAIN_DEV_CLUSTER"
  done
  if [[ -e $LINK && ! $LINK -ef $SLURM_CONF ]] && grep -q "${MARK% *}" "$LINK"; then
    other=$(readlink "$LINK")
    die "another one is there; first: MEDTRAIN_DEV_CLUSTER=${other%/etc/slurm.conf} $0 down"
  fi
}
hosts() { # hosts [LINES]: replaces our lines, in place because in a container the file may be a mount
  local others; others=$(grep -v "$MARK\$" /etc/hosts || true)
  others+=${1:+$'\n'$1}
  [[ $others == "$(cat /etc/hosts)" ]] || printf '%s\n' "$others" >/etc/hosts
}
link() {
  mkdir -p /etc/slurm
  [[ -e $LINK ]] || ln -sfn "$SLURM_CONF" "$LINK" # -f for a link to nowhere
  [[ $LINK -ef $SLURM_CONF ]] ||
    echo "dev-cluster: this machine has a $LINK of its own; run: export SLURM_CONF=$SLURM_CONF" >&2
}
clear_folders() { [[ ! -e $SLURM_CONF ]] || rm -rf "${FOLDERS[@]/#/$ROOT/}"; }
up() {
  local i node fresh="" lines=""
  check_programs
  check_place
  if ! any_alive; then fresh=yes; clear_folders; write_config; fi
  for i in "${!NODES[@]}"; do lines+="${lines:+$'\n'}127.0.2.$((i + 1)) ${NODES[i]} $MARK"; done
  hosts "$lines"
  link
  start_daemon munged
  if with_database; then start_daemon mariadb; start_daemon slurmdbd; fi
  start_daemon slurmctld
  if [[ $fresh ]]; then for node in "${NODES[@]}"; do start_node "$node"; done; fi
  for node in "${NODES[@]}"; do boot "$node"; done
  echo "dev-cluster: up in $SECONDS s; try: srun -N 2 hostname"
}
down() {
  local name
  for name in "${NODES[@]}"; do stop_node "$name"; done
  for name in "${DAEMONS[@]}"; do end "$name" TERM; done
  clear_folders
  rmdir "$ROOT" 2>/dev/null || true
  [[ $(readlink "$LINK") != "$SLURM_CONF" ]] || rm "$LINK"
  hosts
  echo "dev-cluster: down in $SECONDS s"
}
status() {
  local name names=("${NODES[@]}" "${DAEMONS[@]}") rc=0
  [[ -r $SLURM_CONF ]] || { echo "dev-cluster: not up ($ROOT)"; return 1; }
  with_database || names=("${NODES[@]}" slurmctld munged)
  for name in "${names[@]}"; do
    if alive "$name"; then echo "$name runs, pid $(cut -d' ' -f1 "$ROOT/run/$name")"
    else echo "$name does not run"; rc=1; fi
  done
  if alive slurmctld; then sinfo -N -l && squeue || rc=1; fi
  return $rc
}

write_config() {
  local i gpu
  mkdir -p "${FOLDERS[@]/#/$ROOT/}"
  slurm_conf | if [[ $ACCT == none ]]; then grep -v ^AccountingStorage; else cat; fi >"$SLURM_CONF"
  chmod 755 "$ROOT" "$ROOT/munge"
  (umask 077; head -c 1024 /dev/urandom >"$ROOT/munge/key"; slurmdbd_conf >"$ROOT/etc/slurmdbd.conf")
  for gpu in 0 1; do ln -sfn /dev/null "$ROOT/run/gpu$gpu"; done # for Slurm, a GPU is any character device
  echo "NodeName=node[1-4] Name=gpu File=$ROOT/run/gpu[0-1]" >"$ROOT/etc/gres.conf"
}
slurm_conf() {
  cat <<CONF
$MARK
ClusterName=medtrain
SlurmctldHost=$(uname -n | cut -d. -f1)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits for its next run: 120 s unless told.
AuthInfo=socket=$ROOT/munge/socket,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
# Faults show soon; finished jobs stay visible to scontrol for two minutes.
ReturnToService=1
SlurmdTimeout=10
KillWait=5
MinJobAge=120
# What most sites have: array indices up to 1000.
MaxArraySize=1001
# Short jobs start at once.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,default_queue_depth=1000
PriorityType=priority/basic
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A preempted job hears its own --signal, and has its partition's GraceTime to act on it.
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobcomp.txt
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=26819
AccountingStoragePass=$ROOT/munge/socket
AccountingStorageTRES=gres/gpu
# Believe the sizes written here, not the machine's.
SlurmdParameters=config_overrides
GresTypes=gpu
$(for i in {1..4}; do
  echo "NodeName=node$i NodeAddr=127.0.2.$i Port=$((26820 + i)) CPUs=4 RealMemory=4000 Gres=gpu:2"
done)
PartitionName=DEFAULT Nodes=ALL DefMemPerCPU=500 DefaultTime=10 MaxTime=UNLIMITED State=UP PreemptMode=OFF
PartitionName=gpu PriorityTier=10 Default=YES
PartitionName=cpu PriorityTier=10
PartitionName=scavenge PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
CONF
}
slurmdbd_conf() { # StorageHost localhost: the socket of MYSQL_UNIX_PORT, where root needs no password
  cat <<CONF
DbdHost=localhost
DbdPort=26819
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CONF
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
verb=${1:-} name=${2:-}
: "${ACCT:=$(if type slurmdbd mariadbd >/dev/null 2>&1; then echo db; else echo none; fi)}"
case $verb in
  crash | boot) is_node "$name" || die "which node? One of: ${NODES[*]}" ;;&
  stop | start) is_node "$name" || is_daemon "$name" || die "which daemon? One of: ${NODES[*]} ${DAEMONS[*]}" ;;&
  up | down | crash | boot | stop | start)
    [[ $(id -u) == 0 ]] || die "'$verb' needs root; try: sudo $0 $*"
    exec 9</etc/hosts # one at a time on this machine; locking a file that is there leaves nothing behind
    flock -w 120 9 || die "another dev-cluster.sh is at work" ;;&
  crash | boot | stop | start) [[ -e $SLURM_CONF ]] || die "not up; first: $0 up" ;;
esac
case $verb in
  up | down | status) "$verb" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  crash) stop_node "$name"; tell_down "$name" ;;
  boot) boot "$name" ;;
  stop) if is_node "$name"; then stop_node "$name"; else end "$name" TERM; fi ;;
  start) if is_node "$name"; then start_node "$name"; else start_daemon "$name"; fi ;;
  -h | --help | help) usage ;;
  *) usage >&2; exit 64 ;;
esac
