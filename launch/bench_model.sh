#!/usr/bin/env bash
# Measures training steps on this machine, fits drrl-bench model to them, and checks it on other layouts and lengths, which it has not seen.
#
#   launch/bench_model.sh [--out=DIR] [options of drrl-bench scaling and model, without --tp, --cp, --dp, --seq_len and --sequences]
#
#   --out      folder for the runs and model.json (default out/model); runs that are there already are not measured again
#
# Runs to fit to have one and two processes, and one of each kind of attention has four, which may share cores; held-out ones have up to four. Variables: those of
# launch/bench_scaling.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=out/model scaling=() model=()
for argument in "$@"; do
  case $argument in
    --out=*) out=${argument#*=} ;;
    --worlds=* | --node_size=* | --alpha_us=* | --gbps=* | --tolerance=* | --seq_lens=*) model+=("$argument") ;;
    --model=* | --near_block=* | --sink_tokens=* | --basis_updates=* | --rank=*) scaling+=("$argument") model+=("$argument") ;;
    *) scaling+=("$argument") ;;
  esac
done
if [ -z "${DRRL_BIN:-}" ]; then
  . launch/environment.sh
  . launch/build.sh
  drrl_build drrl-bench
  DRRL_BIN=build/$DRRL_PRESET/bin
fi
export DRRL_BIN
mkdir -p "$out"

files=
# measure NAME WORLDS AXIS [options]: adds NAME.json to $files
measure() {
  local name=$1 worlds=$2 axis=$3
  shift 3
  [ -s "$out/$name.json" ] || launch/bench_scaling.sh --out="$out/$name.json" --worlds="$worlds" --axis="$axis" --steps=3 --warmup_steps=1 \
    "${scaling[@]}" "$@"
  files+=${files:+,}$out/$name.json
}
for attention in full lowrank; do
  for length in 1024 4096; do
    measure "$attention-$length" 1,2 dp --attention=$attention --seq_len=$length --sequences=1
    measure "$attention-$length-cp" 2 cp --attention=$attention --seq_len=$length --sequences=1
  done
  measure "$attention-tp" 2 tp --attention=$attention --seq_len=2048 --sequences=1
  measure "$attention-tp-dp" 4 dp --attention=$attention --tp=2 --seq_len=2048 --sequences=1
  measure "$attention-many" 1,2 dp --attention=$attention --seq_len=512 --sequences=4
done
if [ ! -s "$out/collectives.json" ]; then
  launch="mpirun --oversubscribe --bind-to none"
  [ "$(id -u)" -eq 0 ] && launch+=" --allow-run-as-root"
  ${DRRL_LAUNCH:-$launch} -np 2 "$DRRL_BIN/drrl-bench" collectives --threads=1 --operations=all_reduce,all_to_all --bytes=4096,65536,1048576,16777216 \
    --repeats=9 --json="$out/collectives.json"
fi
fitted=$files,$out/collectives.json files=

measure held-out-full-dp 1,2,4 dp --attention=full --seq_len=2048 --sequences=1
measure held-out-lowrank-dp 1,2,4 dp --attention=lowrank --seq_len=2048 --sequences=1
measure held-out-full-tp-dp 4 dp --attention=full --tp=2 --seq_len=1024 --sequences=1
measure held-out-lowrank-tp-dp 4 dp --attention=lowrank --tp=2 --seq_len=4096 --sequences=1
measure held-out-full-cp 2 cp --attention=full --seq_len=2048 --sequences=1
measure held-out-lowrank-cp-dp 4 dp --attention=lowrank --cp=2 --seq_len=2048 --sequences=1
measure held-out-full-tp-cp 4 dp --attention=full --tp=2 --cp=2 --seq_len=4096 --sequences=1

"$DRRL_BIN/drrl-bench" model --runs="$fitted" --validate="$files" --json="$out/model.json" "${model[@]}"
