#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One node with all its GPUs; or several hosts without Slurm, with the same command on each of them.
#
#   bash launch/torchrun.sh [OPTIONS] pretrain|finetune|quantize CONFIG.yaml [section.key=value ...]
#
#   --processes N         processes on this host (default: one per GPU, one without)
#   --hosts N | MIN:MAX   number of hosts (default 1); with MIN:MAX the run goes on when hosts are lost, down to MIN, if
#                         its settings have parallel.elastic=true. Hosts above MAX wait to replace a lost one.
#   --head HOST[:PORT]    host at which the others meet, the same for all (port: 29500)
#   --interface NAME      network interface between the hosts, such as ib0 (default: what NCCL and gloo find)
#   --restarts N          how often the processes are started again after a failure (default 10)
#   --wait SECONDS        how long a host waits for enough others, or as a spare (default 600)
#   --logs DIR            a log file for each rank, seen by all hosts (default: logs/ and the time)
#
# A run that is refused, or fails twice in the same way at the same step, is not started again; its code is 2 when refused.
# SIGTERM, SIGUSR1 or Control-C: the run saves and stops; a second Control-C ends it at once.
set -uo pipefail

fail() { printf 'torchrun.sh: %s\n' "$*" >&2; exit 2; }
number() { [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 is '${2-}': give a number"; }

processes="" hosts=1 head="" interface="" restarts=10 seconds=600 logs=""
while [ $# -gt 0 ]; do
    case $1 in
        --processes) number "$@" && processes=$2 ;;
        --hosts) [[ ${2-} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] && hosts=$2 || fail "--hosts is '${2-}': give N or MIN:MAX" ;;
        --head) [ -n "${2-}" ] && head=$2 || fail "--head needs a host" ;;
        --interface) [ -n "${2-}" ] && interface=$2 || fail "--interface needs a name" ;;
        --restarts) number "$@" && restarts=$2 ;;
        --wait) number "$@" && seconds=$2 ;;
        --logs) [ -n "${2-}" ] && logs=$2 || fail "--logs needs a directory" ;;
        -h | --help)
            sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) fail "unknown option $1: see launch/torchrun.sh --help" ;;
        *) break ;;
    esac
    shift 2
done
[ $# -ge 2 ] || fail "give a command and its settings file, such as pretrain configs/bert_345m.yaml"
[ "$hosts" = 1 ] || [ -n "$head" ] || fail "--hosts $hosts needs --head HOST[:PORT], the same on every host"

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$checkout/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
if [ -z "$processes" ]; then
    processes=$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | wc -l || echo 0)
    [ "$processes" -gt 0 ] || processes=1
fi

export MEGATRON_BERT_LOG_DIR=${logs:-logs/$(date +%Y%m%d-%H%M%S)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -n "$interface" ]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi
if [ "$hosts" = 1 ]; then
    meeting=(--standalone)
else
    case $head in *:*) ;; *) head=$head:29500 ;; esac
    # Without a store of each start's own, a process that is started again can find the address of one that is gone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    settings=join_timeout=$seconds${RDZV_CONF:+,$RDZV_CONF}
    meeting=(--nnodes="$hosts" --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id=megatron-bert)
    if [ -n "$interface" ]; then # hosts need not know each other's names
        own=$(ip -o -4 addr show dev "$interface" | awk 'NR == 1 {sub("/.*", "", $4); print $4}')
        [ -n "$own" ] || fail "--interface $interface has no IPv4 address on this host"
        meeting+=(--local-addr="$own")
        [[ $head != [0-9]*.*.*.*:* ]] || settings+=,is_host=$([ "$own" = "${head%:*}" ] && echo 1 || echo 0)
    fi
    meeting+=(--rdzv-conf="$settings")
fi

# In a session of its own, so that Control-C reaches this script alone. The ranks ignore SIGUSR1 until they can take it.
trap '' USR1
setsid "$python" -m megatron_bert.launching.agent "${meeting[@]}" --nproc-per-node="$processes" --max-restarts="$restarts" \
    -m megatron_bert "$@" &
agent=$!
asked=
ask() { # again and again, for ranks that are not started yet, or not ready to hear it
    while kill -0 "$agent" 2>/dev/null; do
        for rank in $(ps -o pid= --ppid "$agent"); do kill -USR1 "$rank" 2>/dev/null; done
        sleep 1
    done
}
stop() {
    if [ -z "$asked" ]; then
        ask &
    elif [ "$1" = INT ]; then
        kill -TERM "$agent" 2>/dev/null
    fi
    asked=1
}
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop USR1' USR1
while :; do
    wait "$agent"
    code=$?
    kill -0 "$agent" 2>/dev/null || break # else it was a signal that ended the wait
done
if [ "$code" != 0 ] && [ -d "$MEGATRON_BERT_LOG_DIR" ]; then
    "$python" -m megatron_bert failures "$MEGATRON_BERT_LOG_DIR"
fi
exit "$code"
