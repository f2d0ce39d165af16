#!/usr/bin/env bash
# drrl-bench scaling on several numbers of processes, one thread each unless --threads says
# otherwise: prints how efficient they are against the smallest, writes one JSON file.
#
#   launch/bench/scaling.sh [--worlds=1,2,4] [--axis=dp|tp|cp] [--out=FILE] \
#     [options of drrl-bench scaling]
#
#   --worlds   numbers of processes
#   --axis     what grows with them: tensor-parallel or context-parallel processes, or (dp, the
#              default) data-parallel ones, as many as --tp and --cp leave
#   --out      the JSON file (default out/scaling.json): "runs", what drrl-bench wrote, and
#              "efficiency", the table
#
# Variables: DRRL_BIN, a folder that holds drrl-bench: nothing is installed or built. DRRL_LAUNCH,
# the line that starts a job, without -np: DRRL_LAUNCH="mpirun --hostfile FILE" for several hosts
# (default: mpirun on this one, processes of one thread bound to a core each, which several may
# share).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

worlds=1,2,4 axis=dp out=out/scaling.json threads=1 options=()
for argument in "$@"; do
  case $argument in
    --worlds=*) worlds=${argument#*=} ;;
    --axis=dp | --axis=tp | --axis=cp) axis=${argument#*=} ;;
    --axis=*)
      printf 'bench_scaling: error: --axis must be dp, tp or cp, got %s\n' "${argument#*=}" >&2
      exit 2
      ;;
    --out=*) out=${argument#*=} ;;
    --threads=*) threads=${argument#*=} ;;
    --json=*)
      printf 'bench_scaling: error: the result goes to --out=FILE, not to --json\n' >&2
      exit 2
      ;;
    *) options+=("$argument") ;;
  esac
done
if ! [[ $worlds =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]]; then
  printf 'bench_scaling: error: %s, got %s\n' \
    '--worlds must be numbers of processes with commas between' "$worlds" >&2
  exit 2
fi
if [ -z "${DRRL_BIN:-}" ]; then
  . launch/setup/environment.sh
  . launch/setup/build.sh
  drrl_build drrl-bench
  DRRL_BIN=build/$DRRL_PRESET/bin
fi
launch="mpirun --oversubscribe --bind-to none"
[ "$threads" = 1 ] && launch="mpirun --oversubscribe --map-by core --bind-to core:overload-allowed"
[ "$(id -u)" -eq 0 ] && launch+=" --allow-run-as-root"
read -ra launch <<<"${DRRL_LAUNCH:-$launch}"

mkdir -p "$(dirname "$out")"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
files=()
for world in ${worlds//,/ }; do
  members=$world
  [ "$axis" = dp ] && members=0  # all that are left
  printf '\n== %s processes\n' "$world"
  OMP_WAIT_POLICY=passive "${launch[@]}" -np "$world" "$DRRL_BIN/drrl-bench" scaling \
    --threads="$threads" "${options[@]}" "--$axis=$members" --json="$runs/$world.json" </dev/null
  files+=("$runs/$world.json")
done
printf '\n'
"${DRRL_PYTHON:-python3}" launch/bench/scaling_table.py "$out" "${files[@]}"
