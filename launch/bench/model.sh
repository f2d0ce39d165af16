#!/usr/bin/env bash
# Measures training steps on this machine, fits drrl-bench model to them, and checks it on other
# layouts and lengths, which it has not seen.
#
#   launch/bench/model.sh [--out=DIR] [--rounds=N] [options of drrl-bench scaling and model]
#
# Without the options --tp, --cp, --dp, --seq_len and --sequences, which it sets itself.
#
#   --out      folder for the runs and model.json (default out/model); runs that are there already
#              are not measured again
#   --rounds   measure all runs so many times, one round after the other, and take the median of
#              each: for machines whose speed drifts (default 1)
#
# Runs to fit to have one and two processes, and one of each kind of attention has four, which may
# share cores; held-out ones have up to four. Variables: those of launch/bench/scaling.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=out/model rounds=1 scaling=() lowrank=() model=()
for argument in "$@"; do
  case $argument in
    --out=*) out=${argument#*=} ;;
    --rounds=*) rounds=${argument#*=} ;;
    --worlds=* | --node_size=* | --alpha_us=* | --gbps=* | --tolerance=* | --seq_lens=*)
      model+=("$argument")
      ;;
    --model=*) scaling+=("$argument") model+=("$argument") ;;
    --near_block=* | --sink_tokens=* | --basis_updates=* | --rank=*)
      lowrank+=("$argument") model+=("$argument")
      ;;
    *) scaling+=("$argument") ;;
  esac
done
if [ -z "${DRRL_BIN:-}" ]; then
  . launch/setup/environment.sh
  . launch/setup/build.sh
  drrl_build drrl-bench
  DRRL_BIN=build/$DRRL_PRESET/bin
fi
export DRRL_BIN
mkdir -p "$out"
# In a file, since exact attention has no use for them.
printf '%s\n' "${lowrank[@]}" >"$out/lowrank.flags"

if ! [[ $rounds =~ ^[1-9][0-9]*$ ]]; then
  printf 'bench_model: error: --rounds must be a positive number, got %s\n' "$rounds" >&2
  exit 2
fi
fitted='' held_out=''
# measure LIST NAME WORLDS AXIS [options]: adds NAME.json, from the second round on NAME.ROUND.json,
# to $LIST
measure() {
  local -n list=$1
  local file=$out/$2$suffix.json worlds=$3 axis=$4
  shift 4
  [ -s "$file" ] ||
    launch/bench/scaling.sh --out="$file" --worlds="$worlds" --axis="$axis" --steps=3 \
      --warmup_steps=1 "${scaling[@]}" --flagfile="$out/lowrank.flags" "$@"
  list+=${list:+,}$file
}
for ((round = 1; round <= rounds; ++round)); do
  suffix=
  [ "$round" -eq 1 ] || suffix=.$round
  for attention in full lowrank; do
    for length in 1024 4096; do
      measure fitted "$attention-$length" 1,2 dp --attention=$attention --seq_len=$length \
        --sequences=1
      measure fitted "$attention-$length-cp" 2 cp --attention=$attention --seq_len=$length \
        --sequences=1
    done
    measure fitted "$attention-tp" 2 tp --attention=$attention --seq_len=2048 --sequences=1
    measure fitted "$attention-tp-dp" 4 dp --attention=$attention --tp=2 --seq_len=2048 \
      --sequences=1
    measure fitted "$attention-many" 1,2 dp --attention=$attention --seq_len=512 --sequences=4
  done
  if [ ! -s "$out/collectives$suffix.json" ]; then
    launch="mpirun --oversubscribe --map-by core --bind-to core:overload-allowed"
    [ "$(id -u)" -eq 0 ] && launch+=" --allow-run-as-root"
    ${DRRL_LAUNCH:-$launch} -np 2 "$DRRL_BIN/drrl-bench" collectives --threads=1 \
      --operations=all_reduce,all_to_all --bytes=4096,65536,1048576,16777216 --repeats=9 \
      --json="$out/collectives$suffix.json"
  fi
  fitted+=,$out/collectives$suffix.json

  measure held_out held-out-full-dp 1,2,4 dp --attention=exact --seq_len=2048 --sequences=1
  measure held_out held-out-lowrank-dp 1,2,4 dp --attention=lowrank --seq_len=2048 --sequences=1
  measure held_out held-out-full-tp-dp 4 dp --attention=exact --tp=2 --seq_len=1024 --sequences=1
  measure held_out held-out-lowrank-tp-dp 4 dp --attention=lowrank --tp=2 --seq_len=4096 \
    --sequences=1
  measure held_out held-out-full-cp 2 cp --attention=exact --seq_len=2048 --sequences=1
  measure held_out held-out-lowrank-cp-dp 4 dp --attention=lowrank --cp=2 --seq_len=2048 \
    --sequences=1
  measure held_out held-out-full-tp-cp 4 dp --attention=exact --tp=2 --cp=2 --seq_len=4096 \
    --sequences=1
done

"$DRRL_BIN/drrl-bench" model --runs="$fitted" --validate="$held_out" --json="$out/model.json" \
  "${model[@]}"
