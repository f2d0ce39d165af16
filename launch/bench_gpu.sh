#!/usr/bin/env bash
# drrl-bench attention on a GPU, without Open MPI (gpu_environment.sh says what the machine must have): 32 heads in 8 KV groups, d = 64 and 128, bf16
# at L = 4096 to 65536 and fp32 at L = 2048 to 16384. Writes OUT/gpu-attention-DTYPE.json, .csv and .svg; the JSON names date, device, driver and versions.
#
#   [DRRL_PYTHON=python3] [DRRL_DEPS=DIR] launch/bench_gpu.sh [OUT]      OUT: configs/results unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/gpu_environment.sh
out=${1:-configs/results}
mkdir -p "$out"

gpu=$(drrl_gpu)
drrl_gpu_build drrl-bench
for dtype in bf16 fp32; do
  lengths=4096,8192,16384,32768,65536
  [ "$dtype" = fp32 ] && lengths=2048,4096,8192,16384
  result=$out/gpu-attention-$dtype
  build/cuda-no-mpi/bin/drrl-bench attention --device=cuda --dtype=$dtype --seq_lens="$lengths" --head_dims=64,128 --heads=32 \
    --kv_groups=8 --ranks=32,64 --json="$result.json" --csv="$result.csv" --plot="$result.svg"
  "$DRRL_PYTHON" - "$result.json" "$gpu" <<'PYTHON'
import json, sys
import torch
path, gpu = sys.argv[1:]
result = json.load(open(path))
name, driver = (part.strip() for part in gpu.rsplit(",", 1))
result["gpu"] = {"name": name, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__}
with open(path, "w") as file:
    file.write(json.dumps(result, indent=2) + "\n")
PYTHON
  echo "wrote $result.json"
done
