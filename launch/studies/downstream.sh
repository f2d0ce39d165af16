#!/usr/bin/env bash
# What low-rank attention does to answers, from a fresh machine: installs what is missing, builds,
# prepares SmolLM2-135M and texts that it is asked about, measures what ranks cost, makes the sets
# and runs downstream.py on them.
#
#   launch/studies/downstream.sh [--limit N] [-- --device=cuda ...]
#
# Arguments are downstream.py's; results under out/downstream.
#
# Sets, in DRRL_CACHE/downstream: up to 2000 last words of sentences in texts of 2048 tokens from
# held-out books of the Bible, and from the Jargon File, up to 16 of a text; pass keys in 2048, 4096
# and 8192 tokens of the Jargon File, 300 of each; and up to 5000 sentences about films to call
# negative or positive, 32 in a text of 2048 tokens of labelled ones. DRRL_DOWNSTREAM_SETS chooses
# among them, e.g. "passkey-2048 lastword-kjv-2048", of any length (2048 or more for dp at 0.585).
# On CPUs take --limit. See launch/setup/environment.sh for the variables that it listens to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

. launch/setup/environment.sh
. launch/setup/build.sh
drrl_build drrl-eval drrl-policy
drrl_prepare
drrl_calibrate

sets=()
names="lastword-kjv-2048 lastword-jargon-2048 passkey-2048 passkey-4096 passkey-8192 sentiment-2048"
for name in ${DRRL_DOWNSTREAM_SETS:-$names}; do
  file=$DRRL_CACHE/downstream/$name.jsonl
  case $name in
    lastword-kjv-*)
      task=(lastword --count=2000 --together=16 --input "$DRRL_DATA"/text/kjv/valid/*.txt)
      ;;
    lastword-jargon-*)
      task=(lastword --count=2000 --together=16 --input "$DRRL_DATA"/text/jargon/*.txt)
      ;;
    passkey-*) task=(passkey --count=300 --input "$DRRL_DATA"/text/jargon/*.txt) ;;
    sentiment-*)
      "$DRRL_PYTHON" launch/prepare/prepare.py corpus --name reviews \
        --out "$DRRL_DATA/text/reviews"
      task=(sentiment --count=5000 --together=32 --input "$DRRL_DATA/text/reviews/reviews.tsv")
      ;;
    *)
      echo "downstream.sh: error: no set '$name' in DRRL_DOWNSTREAM_SETS; expected" \
        "lastword-kjv-N, lastword-jargon-N, passkey-N or sentiment-N" >&2
      exit 2
      ;;
  esac
  "$DRRL_PYTHON" launch/prepare/downstream_sets.py "${task[@]}" --model "$DRRL_MODEL" \
    --length "${name##*-}" --out "$file"
  sets+=("$file")
done

mkdir -p out/downstream
exec "$DRRL_PYTHON" launch/studies/downstream.py --model "$DRRL_MODEL" --policy "$DRRL_RANKS" \
  --sets "${sets[@]}" --build "build/$DRRL_PRESET" --out out/downstream \
  --json out/downstream/result.json "$@"
