#!/usr/bin/env bash
# The paper's tables, curves, ablations and pictures, from a fresh machine: installs what is
# missing, builds, prepares SmolLM2-135M, the King James Bible and the Jargon File, measures what
# ranks and gates cost on the Bible, trains an agent there, runs every study of perplexity from that
# one policy file on books held out, and draws what they found.
#
#   launch/studies/all.sh [--quick] [STUDY...]
#
#   STUDY   agent, policies, jargon, updates, ranks, ablations; all unless named. Results under
#           out/study, or out/study-quick
#
# Exact blocks have 128 tokens, bases one round of updates. NAME.json has all figures, NAME.jsonl
# what drrl-eval reported in each run, ranks/ every decision, *.svg the pictures, policies.md and
# jargon.md (another kind of prose, ranks of the Bible) the comparison with the paper. What
# NAME.jsonl holds already of the same programs and policy is not run again, so an interrupted study
# goes on where it stopped; delete the file to measure anew. Without --quick many hours on two
# cores, which should have nothing else to do. See launch/setup/environment.sh for the variables
# that it listens to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  echo "all.sh: error: $1; expected [--quick] and any of" \
    "agent, policies, jargon, updates, ranks, ablations" >&2
  exit 2
}
quick=
studies=()
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    agent | policies | jargon | updates | ranks | ablations) studies+=("$argument") ;;
    *) usage "'$argument' is no study" ;;
  esac
done
[ ${#studies[@]} -gt 0 ] || studies=(agent policies jargon updates ranks ablations)

. launch/setup/environment.sh
. launch/setup/build.sh
drrl_build drrl-eval drrl-policy
drrl_prepare

if [ "$quick" ]; then
  out=out/study-quick length=1024 lengths=(1024 2048)
  calibration_tokens=4096 trace_tokens=4096 policy_tokens=4096 tokens=4096
  seeds=2 held_out=1 validation=2 budgets=(0.6 0.8) energies=(0.99) updates=(0 1 -1) blocks=(256)
  budget=0.8 update_budgets=(0.8)
else
  out=out/study length=4096 lengths=(2048 8192)
  calibration_tokens=16384 trace_tokens=65536 policy_tokens=32768 tokens=32768
  seeds=5 held_out=4 validation=4 budgets=(0.3 0.4 0.5 0.585 0.7 0.8)
  energies=(0.9 0.99 0.999) updates=(0 1 2 4 -1) blocks=(64 256)
  budget=0.585 update_budgets=(0.4 0.585)
fi
bin=build/$DRRL_PRESET/bin
shape=(--near_block=128 --basis_updates=1)
ranks=$out/ranks.safetensors traces=$out/traces.safetensors policy=$out/policy.safetensors
mkdir -p "$out"

# The agent learns from the text that ranks were calibrated on.
measure() {
  drrl_on_two "$bin/drrl-policy" "$@" --model "$DRRL_MODEL" --data "$DRRL_DATA/kjv-train" \
    --seq_len=$length
}
[ -f "$ranks" ] ||
  measure calibrate --policy "$ranks" --calibration_tokens=$calibration_tokens "${shape[@]}"
if [ ! -f "$policy" ]; then
  measure record --policy "$ranks" --traces "$traces" --calibration_tokens=$trace_tokens \
    --near_block=128
  cp "$ranks" "$policy.new"
  "$bin/drrl-policy" train --gates --basis_updates=1 --policy "$policy.new" --traces "$traces" \
    --held_out=$held_out --validation=$validation | tee "$out/agent-policy.txt"
  mv "$policy.new" "$policy"
fi

# study NAME SCRIPT TEXT [options of the script]
study() {
  local name=$1 script=$2 text=$3
  shift 3
  "$DRRL_PYTHON" "launch/studies/$script.py" --model "$DRRL_MODEL" --data "$DRRL_DATA/$text" \
    --policy "$policy" --build "build/$DRRL_PRESET" "${shape[@]/#/--flag=}" \
    --json "$out/$name.json" --log "$out/$name.jsonl" "$@" | tee "$out/$name.txt"
  "$DRRL_PYTHON" launch/studies/plots.py "$out/$name.json"
}
for name in "${studies[@]}"; do
  printf '\n== %s (%d:%02d)\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
  case $name in
    agent)
      "$DRRL_PYTHON" launch/studies/agent.py --policy "$ranks" --traces "$traces" \
        --model "$DRRL_MODEL" --seeds $seeds --held_out $held_out --validation $validation \
        --build "build/$DRRL_PRESET" --json "$out/agent.json" -- --gates --basis_updates=1 |
        tee "$out/agent.txt"
      ;;
    policies)
      study policies policies kjv-valid --seq_len "${lengths[@]}" --budgets "${budgets[@]}" \
        --energies "${energies[@]}" --max_tokens $policy_tokens --time \
        --markdown "$out/policies.md"
      ;;
    jargon)
      study jargon policies jargon --seq_len $length --budgets "${budgets[@]}" \
        --energies "${energies[@]}" --max_tokens $tokens --markdown "$out/jargon.md"
      ;;
    updates)
      study updates updates kjv-valid --seq_len $length --budgets "${update_budgets[@]}" \
        --updates "${updates[@]}" --max_tokens $tokens
      ;;
    ranks)
      study ranks ranks kjv-valid --seq_len $length --budget $budget --max_tokens $tokens \
        --out "$out/ranks"
      ;;
    ablations)
      study ablations ablations kjv-valid --seq_len $length --budget $budget \
        --max_tokens $tokens --time --near_blocks "${blocks[@]}" \
        --calibration_data "$DRRL_DATA/kjv-train" --calibration_seq_len $length \
        --calibration_tokens $calibration_tokens --calibrations "$out/calibrations"
      ;;
  esac
done
