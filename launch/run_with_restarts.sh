#!/usr/bin/env bash
# Runs a training and, when it fails in a way that a restart can cure, runs it again with --resume,
# from the newest sound checkpoint.
#
#   launch/run_with_restarts.sh [--max_restarts N] [--hang_s S] [--pause_s P] -- \
#     mpirun -np 4 drrl-train --output=DIR --save_every=100 ...
#
# Restarted: 7 (communication), 8 (numerics: a restart cures what a broken memory did), 11 (hung),
# and death by a signal other than INT and TERM. All other codes end it, 0 (done) and 10
# (interrupted: saved) included; see launch/OPTIONS.md. So do N restarts (default 10), and two
# failures in a row without a new checkpoint between them. Between runs it pauses for P seconds
# (default 10), so that a network or a host can come back. The exit code is that of the last run.
# mpirun can outlive its job: it waits for ever for a host that the network has lost, and for a
# process that somebody has stopped. So it is killed, and the job restarted, when none of the
# drrl-train processes that it had on this host has run for S seconds (default 60). INT, TERM, HUP
# and USR1 make the training save and end, and it ends here too. The command runs in a session of
# its own, so that a Ctrl-C reaches this script alone: mpirun would kill its processes within two
# seconds. It gets USR1, again every 5 s, as an mpirun that is just starting forwards nothing.

say() { printf 'run_with_restarts: %s\n' "$*" >&2; }
usage() {
  say "$1; expected: [--max_restarts N] [--hang_s S] [--pause_s P] --" \
    "COMMAND that holds drrl-train and --output"
  exit 2
}

max_restarts=10 hang_s=60 pause_s=10
while [ "${1:-}" != -- ]; do
  [[ ${2:-} =~ ^[0-9]+$ ]] || usage "'${1:-}' '${2:-}' is not an option with a number"
  case $1 in
    --max_restarts) max_restarts=$2 ;;
    --hang_s) hang_s=$2 ;;
    --pause_s) pause_s=$2 ;;
    *) usage "unknown option '$1'" ;;
  esac
  shift 2
done
shift
[ $# -gt 0 ] || usage "no command"

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

kill_when_hung() {  # PID of mpirun
  trap '' INT TERM HUP USR1
  local seen='' idle=0
  while sleep 1 && kill -0 "$1" 2>/dev/null; do
    if pgrep -P "$1" -x drrl-train -r R,S,D >/dev/null; then
      seen=1 idle=0
    elif [ -n "$seen" ] && ((++idle >= hang_s)); then
      say "no drrl-train of this host has run for $hang_s s, but mpirun is still there: killing it"
      pkill -KILL -P "$1"
      kill -KILL "$1"
    fi
  done
}

# Whether the process catches SIGUSR1: it would end an mpirun that is just starting.
hears_usr1() { (((16#$(sed -n 's/^SigCgt:\t//p' "/proc/$1/status") >> 9) & 1)); }

# SIGUSR1 that comes before drrl-train can hear it waits.
command=()
for word in "$@"; do
  if [[ ${word##*/} == drrl-train && ! -d $word && " ${command[*]} " != *--block-signal* ]]; then
    command+=(env --block-signal=USR1)
  fi
  command+=("$word")
done

child='' signalled='' asked=''
stop() {
  signalled=1
  if [ -n "$child" ] && [ -z "$asked" ]; then
    asked=1
    (
      trap '' INT TERM HUP USR1
      for ((i = 0; i < 300; ++i)); do hears_usr1 "$child" && break; sleep 0.1; done
      while kill -USR1 "$child"; do sleep 5; done
    ) >/dev/null 2>&1 &
  fi
}
trap stop INT TERM HUP USR1
trap '' PIPE  # whoever reads the output may have gone

previous=
for ((restarts = 0; ; ++restarts)); do
  setsid "${command[@]}" --resume </dev/null &
  child=$!
  [ -z "$signalled" ] || stop
  kill_when_hung "$child" &
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal to this script ends the wait early
    wait "$child"
    code=$?
  done
  [ "$code" -eq 0 ] && exit 0
  [ -n "$signalled" ] && exit "$code"
  can_be_cured "$code" || { say "exit code $code: a restart cannot cure that"; exit "$code"; }
  [ "$restarts" -lt "$max_restarts" ] || {
    say "exit code $code after $restarts restarts: giving up"
    exit "$code"
  }
  checkpoint=$(newest)
  [ "$checkpoint" != "$previous" ] || {
    say "exit code $code twice with the checkpoint '$checkpoint': no progress, giving up"
    exit "$code"
  }
  previous=$checkpoint
  say "exit code $code; restart $((restarts + 1)) of at most $max_restarts" \
    "from the checkpoint '$checkpoint' in $pause_s s"
  child=
  for ((s = 0; s < pause_s && !signalled; ++s)); do sleep 1; done
  [ -z "$signalled" ] || { say "stopped in the pause: run it again with --resume"; exit 10; }
done
