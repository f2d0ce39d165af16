#!/usr/bin/env bash
# drrl-bench attention on a GPU, without Open MPI (gpu_environment.sh says what the machine must
# have): 32 heads in 8 KV groups, ranks 32 and 64, exact blocks of 1024 tokens, bases updated once.
# bf16 with d = 128 to L = 131072 and with d = 64 to L = 65536, fp32 with d = 128 to L = 16384.
# Writes OUT/gpu-attention-DTYPE-dD.json, .csv and .svg; the JSON names date, device, driver and
# versions.
#
#   [DRRL_PYTHON=python3] [DRRL_DEPS=DIR] [DRRL_BIN=DIR] launch/bench/gpu.sh [OUT]
#
#   OUT   configs/results/GPU-DATE unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/setup/gpu_environment.sh

gpu=$(drrl_gpu)
name=${gpu%,*}
out=${1:-configs/results/${name// /-}-$(date +%F)}
mkdir -p "$out"
drrl_gpu_build drrl-bench
measure() {
  local dtype=$1 head_dim=$2 lengths=$3 result=$out/gpu-attention-$1-d$2
  "$DRRL_BIN/drrl-bench" attention --device=cuda --dtype="$dtype" --seq_lens="$lengths" \
    --head_dims="$head_dim" --heads=32 --kv_groups=8 --ranks=32,64 --near_block=1024 \
    --basis_updates=1 --json="$result.json" --csv="$result.csv" --plot="$result.svg"
  "$DRRL_PYTHON" - "$result.json" "$gpu" <<'PYTHON'
import json, sys
import torch
path, gpu = sys.argv[1:]
result = json.load(open(path))
name, driver = (part.strip() for part in gpu.rsplit(",", 1))
versions = {"cuda": torch.version.cuda, "torch": torch.__version__}
result["gpu"] = {"name": name, "driver": driver, **versions}
with open(path, "w") as file:
    file.write(json.dumps(result, indent=2) + "\n")
PYTHON
  echo "wrote $result.json"
}

measure bf16 128 8192,16384,32768,65536,131072
measure bf16 64 16384,32768,65536
measure fp32 128 4096,8192,16384
