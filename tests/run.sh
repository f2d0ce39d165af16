#!/usr/bin/env bash
# Runs every test from a clean clone: installs what is missing, prepares the model and the texts,
# builds, then ctest.
#
#   tests/run.sh [ctest options]      e.g. tests/run.sh -R operator, tests/run.sh -L mpi
#
# DRRL_PRESET chooses the build (cuda-release with a CUDA toolkit, else cpu-release; also cpu-debug,
# asan). Exit 0 only if all tests passed. The last line is "N passed, M failed, K skipped".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup/environment.sh
. launch/setup/build.sh

start=$SECONDS
drrl_prepare   # fails early, before a long build, when the model or the texts cannot be had
drrl_build all
printf 'tests: built in %d s (%s)\n' $((SECONDS - start)) "$DRRL_PRESET"

# Launched tests bind to no core and find one another over shared memory and loopback.
results=$DRRL_ROOT/build/$DRRL_PRESET/results.xml
rm -f "$results"
status=0
ctest --test-dir "build/$DRRL_PRESET" --parallel "$(nproc)" --output-on-failure \
  --no-tests=error --timeout 600 --output-junit "$results" "$@" </dev/null || status=$?

[ -f "$results" ] || { echo "tests: error: ctest wrote no results (exit $status)" >&2; exit 1; }
"$DRRL_PYTHON" - "$results" $((SECONDS - start)) <<'EOF'
import sys, xml.etree.ElementTree as xml
suite = xml.parse(sys.argv[1]).getroot()
count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "skipped", "disabled")}
skipped = count["skipped"] + count["disabled"]
times = ((float(c.get("time", 0)), c.get("name")) for c in suite.iter("testcase"))
slow = sorted(times, reverse=True)[:5]
print("tests: slowest:", ", ".join(f"{name} {seconds:.0f} s" for seconds, name in slow))
print(f"tests: {sys.argv[2]} s in all")
failed = count["failures"]
print(f"{count['tests'] - failed - skipped} passed, {failed} failed, {skipped} skipped")
EOF
exit "$status"
