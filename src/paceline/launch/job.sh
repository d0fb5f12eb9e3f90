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
  if [ -z "$ending" ]; then wait "$child" || code=$?; fi
  if [ -n "$ending" ]; then
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
  end_training
}

end_training() {
  ending=yes
  timeout "$LATE_S" paceline stop "$RUN" || kill -TERM "$child" 2>/dev/null
}

# shellcheck disable=SC2329 # a trap calls it
stop_capturing() {
  asked=yes
  ending=yes
  kill -TERM "$child"
}

# One rank's host among several. The first one keeps the run's folder, so it has rank 0, which writes the
# checkpoints: each host is told its number, because torchrun's other way to meet counts hosts by their names.
# shellcheck disable=SC2329 # srun calls it
ranks_of_this_host() {
  file=$RUN
  if [ "$SLURM_NODEID" != 0 ]; then
    own_run_file
    file=$own/run.yaml
  fi
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS" --max-restarts 0 \
    --master-addr "$MEET" --master-port "$MEET_PORT" -m paceline consume "$file"
}

# Wait for the ranks. Without the producer beside them they would wait for ever: its error ends them, and is told.
follow_ranks() {
  failed=0
  while [ -z "$asked" ] && kill -0 "$first" 2>/dev/null && kill -0 "$child" 2>/dev/null; do
    sleep 1 &
    wait "$!"
  done
  if [ -z "$asked" ] && kill -0 "$child" 2>/dev/null; then
    wait "$first" || failed=$?
  fi
  if [ "$failed" != 0 ] && [ -z "$asked" ]; then end_training; fi
  follow
  if [ "$failed" != 0 ]; then code=$failed; fi
}

# A rank or a producer that is killed, or was taken for dead (11), comes again: all of them are started, ten times.
train_on_several_hosts() {
  MEET=$(hostname)
  MEET_PORT=$((29000 + SLURM_JOB_ID % 1000))
  export MEET MEET_PORT
  for _ in 0 1 2 3 4 5 6 7 8 9 10; do
    ending=
    paceline produce "$RUN" &
    first=$!
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
      --kill-on-bad-exit=1 bash -c "$(declare -f own_run_file ranks_of_this_host)"'; ranks_of_this_host' &
    child=$!
    follow_ranks
    kill -TERM "$first" 2>/dev/null
    wait "$first"
    if [ "$code" = 0 ] || [ -n "$asked" ]; then break; fi
    if [ "$failed" != 0 ] && [ "$failed" != 11 ] && [ "$failed" -le 128 ]; then break; fi
  done
  # Measure and export, once everything is trained.
  if [ "$code" = 0 ] && [ -z "$asked" ] && paceline status "$RUN" --json | grep -q '"state": "complete"'; then
    paceline train "$RUN" &
    child=$!
    follow
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
ending=
prepare
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  capture
else
  train
fi
go_on_later
exit "$code"
