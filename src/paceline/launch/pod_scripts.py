"""What runs in the pods of a run: scripts around the ordinary commands, and what their exit codes end."""

from __future__ import annotations

from paceline.errors import (
    ConfigError,
    EngineError,
    ExportError,
    PacelineError,
    TrainingError,
)

SETTINGS = "/etc/paceline"  # where the run files lie
MEET_PORT = 29500
GRACE_S = 300  # at a stop every process reaches a safe point and writes a checkpoint
LAST_WORDS_S = 30  # of these, for what is left once the ranks have ended
# Of a role: it must be mended. The others may pass: a server or a volume is away, or another pod still ends.
ADVISED = sorted({kind.exit_code for kind in (ConfigError, EngineError, TrainingError, ExportError)})
# `paceline train` has started again what could be started again, so what it does not know is final, too.
FINAL = [PacelineError.exit_code, *ADVISED]
OF_A_PRODUCER = list(range(1, 13))  # it has tried for ten minutes
AGAIN = 75  # of a script: nothing is wrong with the run

# A pod that is asked to end has not finished its work, though its process ends in good order.
FOLLOW = """
asked=
first=
child=
trap 'asked=yes; kill -TERM ${first:+"$first"} ${child:+"$child"} 2>/dev/null' TERM
begin() {
  if [ -n "$asked" ]; then exit 143; fi
  "$@" &
  child=$!
}
follow() {
  code=0
  wait "$child" || code=$?
  if [ -n "$asked" ]; then
    wait
    exit 143
  fi
}
"""
# The run may not have begun yet: a producer that ends at once is tried for ten minutes.
PRODUCER = f"""{FOLLOW}
tries=0
while :; do
  began=$SECONDS
  begin paceline produce {SETTINGS}/elsewhere.yaml --join
  follow
  if [ "$code" = 0 ]; then exit 0; fi
  failed=$code
  if [ $((SECONDS - began)) -gt 120 ]; then tries=0; fi
  tries=$((tries + 1))
  if [ "$tries" -ge 20 ]; then exit "$failed"; fi
  begin sleep "${{PAUSE_S:-30}}"
  follow
done
"""
# A rank's pod among several. The first one keeps the run's folder, and alone knows when the work is done.
RANK = f"""{FOLLOW}
run={SETTINGS}/elsewhere.yaml
ended=$(mktemp)
export run ended
# torchrun ends with 1, whatever a rank has ended with.
# shellcheck disable=SC2329 # torchrun calls it
rank() {{
  trap : TERM
  paceline consume "$run"
  code=$?
  if [ "$code" != 0 ]; then echo "$code" >>"$ended"; fi
  exit "$code"
}}
give_up_if_final() {{
  case "$1" in
    {"|".join(map(str, ADVISED))}) exit "$1" ;;
  esac
}}
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  run={SETTINGS}/run.yaml
  begin paceline produce "$run"
  first=$child
fi
begin torchrun --nnodes "$HOSTS" --node-rank "$JOB_COMPLETION_INDEX" --nproc-per-node "$RANKS" \
  --max-restarts 0 --shutdown-timeout {GRACE_S - LAST_WORDS_S} --master-addr "$MEET" \
  --master-port {MEET_PORT} --no-python bash -c "$(declare -f rank)"'; rank'
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  # Without the producer the ranks would wait for ever: its error ends the pod.
  while [ -z "$asked" ] && kill -0 "$first" 2>/dev/null && kill -0 "$child" 2>/dev/null; do
    sleep 1 &
    wait "$!"
  done
  code=0
  if [ -z "$asked" ] && kill -0 "$child" 2>/dev/null; then wait "$first" || code=$?; fi
  if [ "$code" != 0 ] && [ -z "$asked" ]; then
    kill -TERM "$child"
    wait "$child"
    give_up_if_final "$code"
    exit {AGAIN}
  fi
fi
follow
if [ "$code" != 0 ]; then
  while read -r one; do give_up_if_final "$one"; done <"$ended"
  exit {AGAIN}
fi
if [ "$JOB_COMPLETION_INDEX" != 0 ]; then exit {AGAIN}; fi
kill -TERM "$first" 2>/dev/null
wait "$first"
paceline status "$run" --json | grep -q '"state": "complete"' || exit {AGAIN}
exec paceline train "$run"
"""
