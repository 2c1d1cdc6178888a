#!/usr/bin/env bash
# Renews infra/requirements*.lock from pyproject.toml (infra/lock.py); run after changing a dependency. Pins that can stay do.
#   infra/lock.sh [--upgrade]
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
exec python infra/lock.py "$@"
