#!/usr/bin/env bash
# The virtual environment in .venv with the locked versions. Quick when it is already there; never trusts one that is half made.
#   infra/setup.sh                            what a run needs; with a GPU, CUDA's packages too
#   infra/setup.sh dev server cuda            with the tools and tests, with what a tracking server needs, with CUDA all the same
#   PYTHON=/path/to/python infra/setup.sh     another Python than the first suitable one on the PATH
# Without a GPU torch's CPU build is taken where pip is told of one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL): it saves gigabytes.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

groups="base${*:+ $*}"
for group in "$@"; do
    case $group in dev | server | cuda) ;; *) fail "the groups are dev, server and cuda, got '$group'" ;; esac
done
[ ! -e /dev/nvidiactl ] || groups="$groups cuda"

stamp=.venv/.raydiffusion # "building" while it is being made, then the digest of what was installed, and its groups
wanted=$(cat infra/requirements*.lock pyproject.toml | cksum)
present=
if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$wanted" ] && [ -x .venv/bin/python ]; then
    present=$(sed -n 2p "$stamp")
    missing=
    for group in $groups; do case " $present " in *" $group "*) ;; *) missing="$missing $group" ;; esac; done
    [ -n "$missing" ] || exit 0
    groups="$present$missing"
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

if [ -z "$present" ] && [ -e .venv ]; then
    [ -f "$stamp" ] || fail ".venv exists and was not made by this script; move it away first"
    rm -rf .venv || fail "cannot remove the outdated .venv"
fi
case "$groups" in *cuda*) size=6 ;; *) size=3 ;; esac
free=$("$python" -c 'import shutil; print(shutil.disk_usage(".").free // 2**30)')
[ -n "$present" ] || [ "$free" -ge $((2 * size)) ] || fail "needs $((2 * size)) GB of free disk here, found $free GB"

printf 'setup: installing the locked packages into .venv (%s GB, once; a few minutes)\n' "$size" >&2
log=$(mktemp) || fail "cannot write a temporary file (disk full?)"
trap 'rm -f "$log"' EXIT
mkdir -p .venv && echo building >"$stamp" || fail "cannot write .venv here"
[ -n "$present" ] || "$python" -m venv .venv >"$log" 2>&1 || fail "cannot create .venv: $(tail -n 1 "$log")"
install() { .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps "$@" 2>"$log"; }
explain() { grep -m 1 -E '^ERROR' "$log" || tail -n 1 "$log"; }
locked() { # the locks are complete: without --no-deps pip would follow torch to CUDA's packages on any machine
    locks=()
    for group in "$@"; do
        case $group in base) locks+=(-r infra/requirements.lock) ;; *) locks+=(-r "infra/requirements-$group.lock") ;; esac
    done
    install --require-hashes "${locks[@]}" || fail "the packages could not be installed (no network?): $(explain)"
}
cpu_build() { # pip prefers a build whose hash the index names to one that lies in a folder: ask for it by its version
    sed -n '/^torch==/,/[^\\]$/p' infra/requirements.lock | sed '1s/^\(torch==[^ ]*\)/\1+cpu/' >.venv/torch.txt
    install --require-hashes -r .venv/torch.txt && rm .venv/torch.txt
}
case "$(uname -s) $groups" in
Linux*cuda* | Darwin*) ;;
*)
    if ! cpu_build; then
        printf 'setup: pip finds no CPU build of torch; its CUDA build needs the packages of CUDA, 3 GB more\n' >&2
        groups="$groups cuda"
    fi
    ;;
esac
# shellcheck disable=SC2086
locked $groups
install --no-build-isolation -e . || fail "the project could not be installed: $(explain)"
printf '%s\n%s\n' "$wanted" "$groups" >"$stamp"
