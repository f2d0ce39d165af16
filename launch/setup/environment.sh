#!/usr/bin/env bash
# Makes this machine ready to build and run drrl: Debian packages and a Python environment. Installs
# only what is missing and says so; says nothing when all is there. Safe to run again, and from
# several processes at once.
#
#   . launch/setup/environment.sh        sets DRRL_ROOT, DRRL_CACHE, DRRL_PYTHON, DRRL_PRESET and
#                                        puts nvcc on PATH if a toolkit is installed
#   launch/setup/environment.sh          the same, and prints them
#
# Variables that it listens to:
#   DRRL_CACHE          where downloads and environments are kept (default
#                       ${XDG_CACHE_HOME:-~/.cache}/drrl)
#   DRRL_BASE_PYTHON    the Python to make the environment from (default: python3 of PATH, then
#                       /usr/bin/python3)
#   DRRL_PYTHON         a Python that has everything already: used as it is, nothing is installed
#                       for Python
#   DRRL_SKIP_APT=1     the build tools are there by other means: leave Debian's packages alone

drrl_say() { printf 'environment: %s\n' "$*"; }
drrl_fail() { printf 'environment: error: %s\n' "$*" >&2; return 1; }

# drrl_install_packages NAME...: installs the Debian packages among them that are missing.
drrl_install_packages() {
  [ "${DRRL_SKIP_APT:-}" = 1 ] && return 0
  if ! command -v dpkg-query >/dev/null; then
    drrl_fail "this is not a Debian system. Install what these Debian packages hold," \
      "then set DRRL_SKIP_APT=1: $*"
    return 1
  fi
  local missing=() name
  for name in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] ||
      missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return 0

  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      drrl_fail "packages are missing and this is neither root nor a system with sudo." \
        "As root: apt-get install ${missing[*]}"
      return 1
    fi
    as_root=(sudo)
  fi
  drrl_say "installing Debian packages: ${missing[*]}"
  local log apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y
    -o DPkg::Lock::Timeout=300)
  log=$(mktemp) || return 1
  if ! { "${apt[@]}" update &&
    "${apt[@]}" install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    drrl_fail "apt-get could not install: ${missing[*]}"
    return 1
  fi
  rm -f "$log"
}

# Prints a Python (3.11 to 3.14) that can make virtual environments with pip.
drrl_base_python() {
  local candidate
  for candidate in ${DRRL_BASE_PYTHON:+"$DRRL_BASE_PYTHON"} python3 /usr/bin/python3 \
    python3.13 python3.12 python3.11; do
    if "$candidate" -c \
      'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
      2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# Sets DRRL_PYTHON to the Python of an environment that holds launch/setup/requirements.txt, made if
# need be.
drrl_python_environment() {
  [ -n "${DRRL_PYTHON:-}" ] && return 0
  local base requirements=$DRRL_ROOT/launch/setup/requirements.txt key venv temporary lock
  if ! base=$(drrl_base_python); then
    drrl_install_packages python3-venv || return 1
    base=$(drrl_base_python) || {
      drrl_fail "no Python 3.11 to 3.14 with venv and ensurepip; set DRRL_BASE_PYTHON"
      return 1
    }
  fi
  key=$({ cat "$requirements"; "$base" -c 'import sys; print(sys.version, sys.base_prefix)'; } |
    sha256sum | cut -c1-12)
  venv=$DRRL_CACHE/venv-$key
  DRRL_PYTHON=$venv/bin/python
  [ -x "$DRRL_PYTHON" ] && return 0

  mkdir -p "$DRRL_CACHE" || return 1
  exec {lock}>"$DRRL_CACHE/.venv.lock"
  flock "$lock"  # another process may be making it
  if [ ! -x "$DRRL_PYTHON" ]; then
    drrl_say "making a Python environment in $venv (several GB, a few minutes):" \
      "$(grep -o '^[a-z].*' "$requirements" | tr '\n' ' ')"
    # Complete under a temporary name first, so that what was interrupted is never taken for an
    # environment; its scripts get the final name.
    rm -rf "$DRRL_CACHE"/.venv-new.*
    temporary=$(mktemp -d "$DRRL_CACHE/.venv-new.XXXXXX") &&
      "$base" -m venv "$temporary/venv" &&
      "$temporary/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$requirements" &&
      "$temporary/venv/bin/python" -c 'import torch, transformers, gguf' &&
      { grep -lIZF "$temporary/venv" "$temporary"/venv/bin/* |
        xargs -0 -r sed -i "s|$temporary/venv|$venv|g"; } &&
      mv "$temporary/venv" "$venv"
    local status=$?
    rm -rf "$temporary"
    if [ $status -ne 0 ]; then
      exec {lock}>&-
      unset DRRL_PYTHON
      drrl_fail "pip could not make the Python environment (free space in $DRRL_CACHE:" \
        "$(df -h --output=avail "$DRRL_CACHE" | tail -1 | tr -d ' '))"
      return 1
    fi
  fi
  exec {lock}>&-
}

drrl_environment() {
  DRRL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd) || return 1
  DRRL_CACHE=${DRRL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/drrl}
  drrl_install_packages cmake ninja-build g++ ccache libopenmpi-dev openmpi-bin \
    libgoogle-glog-dev libgflags-dev libgtest-dev libgmock-dev nlohmann-json3-dev libxxhash-dev \
    bible-kjv bible-kjv-text jargon-text || return 1
  drrl_python_environment || return 1

  local toolkit
  for toolkit in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    if ! command -v nvcc >/dev/null && [ -n "$toolkit" ] && [ -x "$toolkit/bin/nvcc" ]; then
      PATH=$PATH:$toolkit/bin
    fi
  done
  if command -v nvcc >/dev/null; then
    DRRL_PRESET=${DRRL_PRESET:-cuda-release}
  else
    DRRL_PRESET=${DRRL_PRESET:-cpu-release}
  fi

  # As root mpirun wants to be asked twice; on a machine with fewer cores than processes it must be
  # allowed to share them.
  DRRL_MPIRUN=(mpirun --oversubscribe --bind-to none)
  [ "$(id -u)" -eq 0 ] && DRRL_MPIRUN+=(--allow-run-as-root)
  export DRRL_ROOT DRRL_CACHE DRRL_PYTHON DRRL_PRESET PATH
}

drrl_environment || return 1 2>/dev/null || exit 1

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  printf '%s=%s\n' DRRL_ROOT "$DRRL_ROOT" DRRL_CACHE "$DRRL_CACHE" DRRL_PYTHON "$DRRL_PYTHON" \
    DRRL_PRESET "$DRRL_PRESET"
fi
