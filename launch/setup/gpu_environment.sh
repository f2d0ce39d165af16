#!/usr/bin/env bash
# Functions shared by tests/run_gpu.sh and bench/gpu.sh; source it from the repository's root. For a
# machine with an NVIDIA GPU, a CUDA toolkit, CMake, Ninja and a Python with torch, where nothing
# can be installed: the preset cuda-no-mpi.
#
#   DRRL_PYTHON   the Python that has torch (default python3)
#   DRRL_BIN      a folder of programs that were built already, for this torch and CUDA: nothing is
#                 built (default: build/cuda-no-mpi/bin, built first)
#   DRRL_DEPS     a folder that launch/setup/carry_packages.sh made, if GoogleTest, gflags, glog,
#                 nlohmann-json and xxhash are not installed

# drrl_gpu: fails without a GPU; else prints "name, driver".
drrl_gpu() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1 | grep . ||
    { echo "error: nvidia-smi shows no GPU here" >&2; return 1; }
  "$DRRL_PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "error: torch of $DRRL_PYTHON sees no usable GPU" >&2; return 1; }
}

# drrl_gpu_build TARGET...: into build/cuda-no-mpi.
drrl_gpu_build() {
  local python library_folder options=() deps=${DRRL_DEPS:-}
  [ -n "${DRRL_BIN:-}" ] && return 0
  python=$(command -v "$DRRL_PYTHON") || { echo "error: no $DRRL_PYTHON" >&2; return 1; }
  if [ -n "$deps" ]; then
    deps=$(cd "$deps" && pwd)/usr || return 1
    # What the carried libraries load in turn; the compiler looks for headers without a CMake
    # package in CPATH.
    library_folder=$(uname -m)-linux-gnu
    LD_LIBRARY_PATH=$deps/lib/$library_folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    CPATH=$deps/include${CPATH:+:$CPATH}
    export LD_LIBRARY_PATH CPATH
    options=(-DCMAKE_PREFIX_PATH="$deps" -DCMAKE_LIBRARY_ARCHITECTURE="$library_folder")
  fi
  command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  cmake --preset cuda-no-mpi -DDRRL_PYTHON="$python" "${options[@]}" &&
    cmake --build --preset cuda-no-mpi --target "$@" &&
    DRRL_BIN=build/cuda-no-mpi/bin
}

DRRL_PYTHON=${DRRL_PYTHON:-python3}
