#!/usr/bin/env bash
# Downloads the Debian packages that a machine with a GPU needs to build drrl without Open MPI, and
# unpacks them into a folder that can be carried there. Nothing is installed, neither here nor
# there; run it on Debian (or Ubuntu) of the same architecture.
#
#   launch/setup/carry_packages.sh DIR
#   then, on the other machine: DRRL_DEPS=DIR tests/run_gpu.sh
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
mkdir -p "$1"
target=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# Where an older package runs on a newer system: headers and static libraries, and shared libraries
# with what they load.
apt-get -q download libgtest-dev libgmock-dev nlohmann-json3-dev libxxhash-dev libgflags-dev \
  libgflags2.2 libgoogle-glog-dev libgoogle-glog0v6 libunwind-dev libunwind8 ||
  { echo "carry_packages: error: apt-get could not download (is apt-get update due?)" >&2; exit 1; }
for package in *.deb; do
  dpkg -x "$package" "$target"
done
rm -rf "$target"/usr/share/doc "$target"/usr/share/man
echo "carry_packages: $(du -sh "$target" | cut -f1) in $target"
