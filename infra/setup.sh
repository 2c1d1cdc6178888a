#!/usr/bin/env bash
# The virtual environment in .venv with the locked versions. Quick when it is already there; never trusts one that is half made.
#   PYTHON=/path/to/python infra/setup.sh     another Python than the first suitable one on the PATH
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

stamp=.venv/.raydiffusion # "building" while it is being made, then the digest of what was installed
wanted=$(cat infra/requirements.lock pyproject.toml | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x .venv/bin/python ]; then
    exit 0
fi

python=
if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
    python=$PYTHON
else
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null && suitable "$candidate"; then python=$candidate; break; fi
    done
    found=$(python3 --version 2>/dev/null || true)
    [ -n "$python" ] || fail "needs Python 3.11, 3.12 or 3.13 on the PATH, found ${found:-none}; name another with PYTHON=/path/to/python"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module (Debian: apt-get install python3-venv)"

if [ -e .venv ]; then
    [ -f "$stamp" ] || fail ".venv exists and was not made by this script; move it away first"
    rm -rf .venv || fail "cannot remove the outdated .venv"
fi
free=$("$python" -c 'import shutil; print(shutil.disk_usage(".").free // 2**30)')
[ "$free" -ge 6 ] || fail "needs 6 GB of free disk here, found $free GB"

printf 'setup: installing the locked packages into .venv (2.8 GB, once; a few minutes)\n' >&2
log=$(mktemp) || fail "cannot write a temporary file (disk full?)"
trap 'rm -f "$log"' EXIT
mkdir .venv && echo building >"$stamp" || fail "cannot write .venv here"
"$python" -m venv .venv >"$log" 2>&1 || fail "cannot create .venv: $(tail -n 1 "$log")"
install() { .venv/bin/python -m pip install --disable-pip-version-check --quiet "$@" 2>"$log"; }
explain() { grep -m 1 -E '^ERROR' "$log" || tail -n 1 "$log"; }
install -r infra/requirements.lock || fail "the packages could not be installed (no network?): $(explain)"
install --no-deps --no-build-isolation -e . || fail "the project could not be installed: $(explain)"
echo "$wanted" >"$stamp"
