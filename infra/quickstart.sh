#!/usr/bin/env bash
# The whole run on real images: shard, train, evaluate, register, serve, report.
#   infra/quickstart.sh [--keep] ...     options go to python -m jobs.quickstart (see its --help)
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash infra/setup.sh
exec .venv/bin/python -m jobs.quickstart "$@"
