# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
restarts=${SLURM_RESTART_COUNT:-0}

# Where the ranks meet: an address, a port and a name that belong to this job and this start of it alone.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$first" | awk 'NR == 1 {print $1}')
[ -n "$address" ] || address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port_of() { echo $((20000 + (SLURM_JOB_ID * 16 + restarts + $1) % 12000)); }
run_id=$SLURM_JOB_ID.$restarts

# A log file for every rank, and records of how each ended; rank 0 is in this job's output too.
export MEGATRON_BERT_LOG_DIR=$RUN_DIR/logs/$run_id
mkdir -p "$MEGATRON_BERT_LOG_DIR"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The most of the nodes that were given on which every process has a place.
nodes=0
for count in "${NODE_COUNTS[@]}"; do
    if [ "$count" -le "$SLURM_JOB_NUM_NODES" ] && [ "$count" -gt "$nodes" ]; then nodes=$count; fi
done

run=(-m megatron_bert "$COMMAND" "$CONFIG" "training.run_dir=$RUN_DIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
step=(srun --nodes="$nodes" --kill-on-bad-exit=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"})
[ -z "${SLURM_CPUS_PER_TASK-}" ] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
if [ "$STYLE" = torchrun ]; then
    # One agent per node, which starts a process per GPU, and starts all of them again when one fails. Without a store of
    # each start's own a process can find the address of one that is gone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    run=(-m megatron_bert.launching.agent --nnodes="$nodes" --nproc-per-node="$GPUS_PER_NODE"
        --max-restarts="$MAX_RESTARTS" --rdzv-backend=c10d --rdzv-id="$run_id" --rdzv-endpoint="$address:$(port_of 0)" "${run[@]}")
    step+=(--ntasks="$nodes" --ntasks-per-node=1)
    tries=1
else
    # One task per GPU, in the order of the nodes. When one fails, a new step starts all of them again.
    step+=(--ntasks=$((nodes * GPUS_PER_NODE)) --ntasks-per-node="$GPUS_PER_NODE" --distribution=block)
    export MASTER_ADDR=$address
    tries=$((MAX_RESTARTS + 1))
fi
# Slurm hands a signal to every process of a step. Ignored from the start, it ends none that has no handler yet, nor an
# agent, which has none at all; the trainer takes it from its first step on.
step+=(bash -c 'trap "" USR1; exec "$@"' rank ${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" "${run[@]}")

# The time is almost up: ask the ranks to save and stop, again and again for those that were not ready to hear it.
ask_to_stop() {
    echo "job $run_id: asked to stop; the ranks save a checkpoint"
    while kill -0 "$srun_pid" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID"
        sleep 10
    done &
}
srun_pid=0 ended=
trap ask_to_stop USR1
trap 'ended=1' TERM # preempted, cancelled, or a node is gone: Slurm has signaled the ranks, and requeues what it should

echo "job $run_id: $COMMAND on $nodes of $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $GPUS_PER_NODE by $STYLE"
for ((try = 0; try < tries; try++)); do
    if [ "$STYLE" = srun ]; then export MASTER_PORT="$(port_of "$try")"; fi
    "${step[@]}" &
    srun_pid=$!
    while :; do
        wait "$srun_pid"
        code=$?
        kill -0 "$srun_pid" 2>/dev/null || break # else it was a signal that ended the wait
    done
    # 0: done or stopped; 75: stopped, of a process alone.
    case $code in 0 | 75) break ;; esac
    [ -z "$ended" ] || break
    echo "job $run_id: the run failed with code $code"
    srun --nodes=1 --ntasks=1 --overlap ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} \
        "$PYTHON" -m megatron_bert failures --check-retry "$MEGATRON_BERT_LOG_DIR"
    case $? in # the code of srun may be that of a rank which was ended because of another
        3) code=2 && break ;; # refused
        4) code=1 && break ;; # failed twice in the same way
    esac
done

case $code in
    0 | 75)
        # The run says why it stopped, if it has more to do.
        if [ "$REQUEUE" = 1 ] && [ -z "$ended" ] &&
            grep -qs 'SIGUSR1\|training.max_minutes' "$RUN_DIR/stopped.json"; then
            echo "job $run_id: there is more to do; requeued"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        exit 0
        ;;
    *) exit "$code" ;;
esac
