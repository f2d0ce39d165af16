#!/usr/bin/env bash
# The paper's tables, curves, ablations and pictures, from a fresh machine: installs what is missing, builds, prepares SmolLM2-135M and the King James Bible,
# measures what ranks cost, trains an agent, runs every study of perplexity from that one policy file, and draws what they found.
#
#   launch/study.sh [--quick] [STUDY...]      STUDY: agent, policies, updates, ranks, ablations; all unless named. Results under out/study, or out/study-quick
#
# NAME.json has all figures, NAME.jsonl what drrl-eval reported in each run, ranks/ every decision, *.svg the pictures, policies.md the comparison with the paper. What
# NAME.jsonl holds already of the same programs and policy is not run again, so an interrupted study goes on where it stopped; delete the file to measure anew. Without
# --quick many hours on two cores, which should have nothing else to do. See launch/environment.sh for the variables that it listens to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { echo "study.sh: error: $1; expected [--quick] and any of agent, policies, updates, ranks, ablations" >&2; exit 2; }
quick=
studies=()
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    agent | policies | updates | ranks | ablations) studies+=("$argument") ;;
    *) usage "'$argument' is no study" ;;
  esac
done
[ ${#studies[@]} -gt 0 ] || studies=(agent policies updates ranks ablations)

. launch/environment.sh
. launch/build.sh
drrl_build drrl-eval drrl-policy
drrl_prepare
drrl_calibrate

if [ "$quick" ]; then
  out=out/study-quick traces=(2048:6144) lengths=(2048) policy_tokens=8192
  seeds=2 aside=1 budgets=(0.5 0.7) energies=(0.99) updates=(0 2 -1) length=2048 tokens=4096 blocks=(128)
else
  out=out/study traces=(2048:65536 8192:65536) lengths=(2048 8192) policy_tokens=65536
  seeds=5 aside=2 budgets=(0.3 0.4 0.5 0.585 0.7 0.8) energies=(0.9 0.99 0.999) updates=(0 1 2 4 -1) length=4096 tokens=32768 blocks=(128 512)
fi
bin=build/$DRRL_PRESET/bin
policy=$out/policy.safetensors
mkdir -p "$out"

# The agent learns from the text that ranks were calibrated on. TOKENS of sequences of LENGTH: LENGTH:TOKENS.
traces_of() { echo "$out/traces-${1%:*}.safetensors"; }
files=()
for trace in "${traces[@]}"; do
  files+=("$(traces_of "$trace")")
done
if [ ! -f "$policy" ]; then
  cp "$DRRL_RANKS" "$policy.new"
  for trace in "${traces[@]}"; do
    drrl_on_two "$bin/drrl-policy" record --model "$DRRL_MODEL" --data "$DRRL_DATA/kjv-train" --policy "$policy.new" --seq_len="${trace%:*}" \
      --calibration_tokens="${trace#*:}" --traces "$(traces_of "$trace")"
  done
  "$bin/drrl-policy" train --gates --policy "$policy.new" --traces "$(IFS=, && echo "${files[*]}")" | tee "$out/agent-policy.txt"
  mv "$policy.new" "$policy"
fi

for study in "${studies[@]}"; do
  printf '\n== %s (%d:%02d)\n' "$study" $((SECONDS / 60)) $((SECONDS % 60))
  case $study in
    agent)
      "$DRRL_PYTHON" launch/study_agent.py --policy "$DRRL_RANKS" --traces "${files[@]}" --seeds $seeds --held_out $aside --validation $aside \
        --build "build/$DRRL_PRESET" --json "$out/agent.json" -- --gates | tee "$out/agent.txt"
      continue ;;
    policies) more=(--seq_len "${lengths[@]}" --budgets "${budgets[@]}" --energies "${energies[@]}" --max_tokens "$policy_tokens" --time --markdown "$out/policies.md") ;;
    updates) more=(--seq_len "$length" --updates "${updates[@]}" --max_tokens "$tokens") ;;
    ranks) more=(--seq_len "$length" --max_tokens "$tokens" --out "$out/ranks") ;;
    ablations) more=(--seq_len "$length" --max_tokens "$tokens" --time --near_blocks "${blocks[@]}" --calibration_data "$DRRL_DATA/kjv-train" --calibrations "$out/calibrations") ;;
  esac
  "$DRRL_PYTHON" "launch/study_$study.py" --model "$DRRL_MODEL" --data "$DRRL_DATA/kjv-valid" --policy "$policy" --build "build/$DRRL_PRESET" \
    --json "$out/$study.json" --log "$out/$study.jsonl" "${more[@]}" | tee "$out/$study.txt"
  "$DRRL_PYTHON" launch/plots.py "$out/$study.json"
done
