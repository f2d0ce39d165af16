#!/usr/bin/env bash
# Checks the form of every tracked file: format, lines of at most 100 columns, lint, spelling,
# links, and tables that come from raw files.
#
#   .ci/lanes.sh          says what it finds; exit status 1 if that is anything
#   .ci/lanes.sh --fix    mends what the tools can mend, then checks
#
# The tools come from .ci/requirements.txt, into an environment under DRRL_CACHE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fix=
case ${1:-} in
  '') ;;
  --fix) fix=1 ;;
  *)
    echo "lanes.sh: error: unknown argument '$1', expected --fix or none" >&2
    exit 2
    ;;
esac

cache=${DRRL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/drrl}
tools=$cache/lanes-$(sha256sum .ci/requirements.txt | cut -c1-12)
if [ ! -x "$tools/bin/shellcheck" ]; then
  rm -rf "$tools"
  mkdir -p "$cache"
  python3 -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check -r .ci/requirements.txt || {
    rm -rf "$tools"
    exit 1
  }
fi
PATH=$tools/bin:$PATH

mapfile -t sources < <(git ls-files '*.h' '*.cpp' '*.cu')
mapfile -t scripts < <(git ls-files '*.sh' .ci/run .ci/nightly configs/slurm/train.sbatch)
mapfile -t python < <(git ls-files '*.py')
mapfile -t pages < <(git ls-files '*.md')
mapfile -t cmake < <(git ls-files '*CMakeLists.txt' '*.cmake' '*.cmake.in')

if [ "$fix" ]; then
  clang-format -i "${sources[@]}"
  ruff check --quiet --fix "${python[@]}" || true
  ruff format --quiet "${python[@]}"
fi

failed=()
# lane NAME COMMAND...: runs it, and remembers that it found something.
lane() {
  local name=$1
  shift
  echo "lane: $name"
  "$@" || failed+=("$name")
}
# Fails if a line of the files has more than 100 columns, and prints it.
columns() { ! LC_ALL=C.UTF-8 grep -nHE '^.{101,}' "$@"; }

lane clang-format clang-format --dry-run --Werror "${sources[@]}"
lane ruff-format ruff format --quiet --check "${python[@]}"
lane ruff ruff check --quiet --output-format concise "${python[@]}"
lane shellcheck shellcheck --external-sources --severity warning "${scripts[@]}"
lane links python3 .ci/links.py "${pages[@]}"
lane result-tables python3 launch/studies/result_tables.py --check
lane codespell codespell --toml pyproject.toml
lane columns columns "${sources[@]}" "${python[@]}" "${scripts[@]}" "${cmake[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  echo "lanes: error: ${failed[*]} found something; .ci/lanes.sh --fix mends format" >&2
  exit 1
fi
echo "lanes: nothing found"
