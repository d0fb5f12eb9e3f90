# What each job of the run does. A job of an array joins as a producer; the other one trains. Whatever ends a
# job, the same job goes on: what was durable stays, the rest is done again.
export WORK RUN NAME SEED RANKS ELSEWHERE

prepare() {
  cd -- "$WORK" || exit
  export PATH="$BIN:$PATH"
  if [ -n "$SETUP" ]; then
    # shellcheck disable=SC1090 # the user's own file
    . "$SETUP" || exit
  fi
}

# Hosts must not share a run's folder: this one gets a folder of its own, and a run file that says so.
own_run_file() {
  own=$(mktemp -d /tmp/paceline.XXXXXXXX) || exit
  trap 'rm -rf -- "$own"' EXIT
  {
    printf 'run: {name: "%s", seed: %s, directory: "%s/run"}\n' "$NAME" "$SEED" "$own"
    printf '%s\n' "$ELSEWHERE"
  } >"$own/run.yaml" || exit
}

# Wait for the process `child`; a signal to this script ends the first wait alone. What was asked to stop and has
# not come to a safe point in time is ended at once: a job that its time limit ends is not queued again.
follow() {
  code=0
  wait "$child" || code=$?
  if [ -n "$asked" ]; then
    timeout "$LATE_S" tail --pid="$child" --follow /dev/null || kill -TERM "$child" 2>/dev/null
    code=0
    wait "$child" || code=$?
  fi
}

# The time limit is near: stop in good order, and queue the same job again.
go_on_later() {
  if [ -n "$asked" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

# shellcheck disable=SC2329 # a trap calls it
stop_training() {
  asked=yes
  timeout "$LATE_S" paceline stop "$RUN" || kill -TERM "$child" 2>/dev/null
}

# shellcheck disable=SC2329 # a trap calls it
stop_capturing() {
  asked=yes
  kill -TERM "$child"
}

# One rank's host among several. The first one keeps the run's folder.
# shellcheck disable=SC2329 # srun calls it
ranks_of_this_host() {
  file=$RUN
  if [ "$SLURM_NODEID" != 0 ]; then
    own_run_file
    file=$own/run.yaml
  fi
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS" --max-restarts 10 --rdzv-backend c10d \
    --rdzv-endpoint "$MEET" --rdzv-id "$SLURM_JOB_ID" -m paceline consume "$file"
}

train_on_several_hosts() {
  MEET="$(hostname):$((29000 + SLURM_JOB_ID % 1000))"
  export MEET
  paceline produce "$RUN" &
  first=$!
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c "$(declare -f own_run_file ranks_of_this_host)"'; ranks_of_this_host' &
  child=$!
  follow
  kill -TERM "$first" 2>/dev/null
  wait "$first"
  # Measure and export, once everything is trained.
  if [ "$code" = 0 ] && [ -z "$asked" ] && paceline status "$RUN" --json | grep -q '"state": "complete"'; then
    paceline train "$RUN" || code=$?
  fi
}

train() {
  trap stop_training USR1
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    train_on_several_hosts
  else
    paceline train "$RUN" &
    child=$!
    follow
  fi
}

# The run may not have begun yet, or may be over: a producer that ends at once is tried for ten minutes.
capture() {
  trap stop_capturing USR1
  own_run_file
  tries=0
  while :; do
    began=$SECONDS
    paceline produce "$own/run.yaml" --join &
    child=$!
    follow
    if [ "$code" = 0 ] || [ -n "$asked" ]; then break; fi
    if [ $((SECONDS - began)) -gt 120 ]; then tries=0; fi
    tries=$((tries + 1))
    if [ "$tries" -ge 20 ]; then break; fi
    sleep "$PAUSE_S" &
    child=$!
    follow
    if [ -n "$asked" ]; then break; fi
  done
}

asked=
prepare
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  capture
else
  train
fi
go_on_later
exit "$code"
