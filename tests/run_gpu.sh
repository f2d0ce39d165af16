#!/usr/bin/env bash
# Builds and runs the tests that need a GPU, without Open MPI (launch/setup/gpu_environment.sh says
# what the machine must have). Fails where there is no GPU: a skipped test is no success here.
#
#   [DRRL_PYTHON=python3] [DRRL_DEPS=DIR] [DRRL_BIN=DIR] tests/run_gpu.sh [GoogleTest options]
#
# GoogleTest options: e.g. --gtest_filter='*Eigh*'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup/gpu_environment.sh

gpu=$(drrl_gpu)
echo "tests: $gpu"
drrl_gpu_build gpu_test
DRRL_REQUIRE_GPU=1 "$DRRL_BIN/gpu_test" "$@"
