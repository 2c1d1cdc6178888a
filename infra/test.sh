#!/usr/bin/env bash
# Every check: format, lint, types, tests.
#   infra/test.sh              about 18 minutes on 2 cores
#   infra/test.sh --all        the long tests too
#   infra/test.sh [--all] ...  further arguments go to pytest
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash infra/setup.sh dev
marker='not slow'
if [ "${1:-}" = --all ]; then marker=''; shift; fi
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check --quiet . || { echo "run: .venv/bin/ruff format ." >&2; exit 1; }
ruff check --quiet .
basedpyright --level error
exec python -m pytest -m "$marker" "$@"
