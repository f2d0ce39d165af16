#!/usr/bin/env bash
# Runs a training and, when it fails in a way that a restart can cure, runs it again with --resume, from the newest sound checkpoint.
#
#   launch/run_with_restarts.sh [--max_restarts N] -- mpirun -np 4 drrl-train --output=DIR --save_every=100 ...
#
# Restarted: 7 (communication), 8 (numerics: a restart cures what a broken memory did), 11 (hung), and death by a signal other than INT
# and TERM. All other codes end it, 0 (done) and 10 (interrupted: saved) included; see launch/OPTIONS.md. So do N restarts (default 10),
# and two failures in a row without a new checkpoint between them. The exit code is that of the last run.
# INT, TERM and USR1 are passed on: the training saves, and it ends here too.

say() { printf 'run_with_restarts: %s\n' "$*" >&2; }
usage() { say "$1; expected: [--max_restarts N] -- COMMAND that holds drrl-train and --output"; exit 2; }

max_restarts=10
if [ "${1:-}" = --max_restarts ]; then max_restarts=${2:-} && shift 2; fi
[[ $max_restarts =~ ^[0-9]+$ ]] || usage "--max_restarts is '$max_restarts', not a number"
[ "${1:-}" = -- ] && [ $# -gt 1 ] || usage "no command"
shift

output=
for ((i = 1; i <= $#; ++i)); do
  case ${!i} in
    --output=* | -output=*) output=${!i#*=} ;;
    --output | -output) next=$((i + 1)) output=${!next:-} ;;
  esac
done
[ -n "$output" ] || usage "no --output among: $*"

newest() { cat "$output/checkpoints/latest" 2>/dev/null || echo none; }
can_be_cured() { case $1 in 7 | 8 | 11) true ;; 130 | 143) false ;; *) [ "$1" -gt 128 ] ;; esac; }

child= signalled=
pass_on() { signalled=1; [ -n "$child" ] && kill -USR1 "$child" 2>/dev/null; }
trap pass_on INT TERM USR1

previous=
for ((restarts = 0; ; ++restarts)); do
  "$@" --resume &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal to this script ends the wait early
    wait "$child"
    code=$?
  done
  [ "$code" -eq 0 ] && exit 0
  [ -n "$signalled" ] && exit "$code"
  can_be_cured "$code" || { say "exit code $code: a restart cannot cure that"; exit "$code"; }
  [ "$restarts" -lt "$max_restarts" ] || { say "exit code $code after $restarts restarts: giving up"; exit "$code"; }
  checkpoint=$(newest)
  [ "$checkpoint" != "$previous" ] || { say "exit code $code twice with the checkpoint '$checkpoint': no progress, giving up"; exit "$code"; }
  previous=$checkpoint
  say "exit code $code; restart $((restarts + 1)) of at most $max_restarts from the checkpoint '$checkpoint'"
done
