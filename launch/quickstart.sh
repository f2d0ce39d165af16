#!/usr/bin/env bash
# From a fresh machine to a fine-tuned model: installs what is missing, builds, prepares
# SmolLM2-135M and the King James Bible, fine-tunes with two processes under mpirun, once with exact
# and once with low-rank attention, and prints what was gained and what was lost on books of the
# Bible that neither run has seen. A second run reuses everything but the training.
#
#   launch/quickstart.sh          results under out/quickstart
#
# Exit 0 only if all of it worked, the training loss fell and so did the held-out perplexity. See
# launch/setup/environment.sh for the variables that it listens to; DRRL_QUICKSTART_STEPS overrides
# the number of training steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() { printf '\n== %s (%d:%02d)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

stage "machine"
. launch/setup/environment.sh
. launch/setup/build.sh

stage "build ($DRRL_PRESET)"
drrl_build drrl-train drrl-eval drrl-policy

stage "model and text"
drrl_prepare

stage "how much low ranks hurt in each layer"
drrl_calibrate

out=out/quickstart
bin=build/$DRRL_PRESET/bin
common=(--model "$DRRL_MODEL" --flagfile=configs/quickstart.flags)
lowrank=(--attention=lowrank --rank_policy=dp --gates --policy "$DRRL_RANKS")
rm -rf "$out"
mkdir -p "$out"

# train NAME FLAG...: fine-tunes into $out/NAME; the model ends up in $out/NAME/hf
train() {
  local name=$1
  shift
  drrl_on_two "$bin/drrl-train" "${common[@]}" --flagfile=configs/quickstart-train.flags \
    --data "$DRRL_DATA/kjv-train" --output "$out/$name" \
    ${DRRL_QUICKSTART_STEPS:+--steps="$DRRL_QUICKSTART_STEPS"} --json "$out/$name.json" "$@"
}

# evaluate NAME MODEL FLAG...: perplexity of the held-out books into $out/NAME.json
evaluate() {
  local name=$1 model=$2
  shift 2
  drrl_on_two "$bin/drrl-eval" "${common[@]}" --flagfile=configs/quickstart-eval.flags \
    --model "$model" --data "$DRRL_DATA/kjv-valid" --json "$out/$name.json" "$@"
}

# --compare_exact evaluates each sequence with both kinds of attention and times both.
stage "held-out perplexity before training"
evaluate before "$DRRL_MODEL" "${lowrank[@]}" --compare_exact
stage "fine-tuning, exact attention"
train exact --attention=exact
stage "fine-tuning, low rank"
train lowrank "${lowrank[@]}"
stage "held-out perplexity after training, exact attention"
evaluate after-exact "$out/exact/hf" --attention=exact
stage "held-out perplexity after training, low rank"
evaluate after-lowrank "$out/lowrank/hf" "${lowrank[@]}" --compare_exact

stage "result"
"$DRRL_PYTHON" launch/studies/quickstart_table.py "$out"
