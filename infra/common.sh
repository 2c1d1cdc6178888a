# What infra/cluster.sh and infra/stack.sh share; each sets `self`, and `usage`, the last line of its help.
here=$(cd "$infra/.." && pwd)
python=$here/.venv/bin/python
adopting='import ctypes, os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)
ctypes.CDLL(None).prctl(36, 1); os.execvp(sys.argv[1], sys.argv[1:])' # 36: PR_SET_CHILD_SUBREAPER

say() { printf '%s: %s\n' "$(basename "$self" .sh)" "$*" >&2; }
fail() { say "$*"; exit 1; }
usage() { sed -n "2,${usage}s/^# \{0,1\}//p" "$self" >&2; exit 2; }

become_unprivileged() { # root starts nothing itself
    [ "$(id -u)" = 0 ] || return 0
    local user=${RAYDIFFUSION_USER:-raydiffusion} home
    id "$user" >/dev/null 2>&1 || fail "root starts nothing: make a user (useradd --system --create-home $user) or name one with RAYDIFFUSION_USER"
    [ "$(id -u "$user")" != 0 ] || fail "RAYDIFFUSION_USER must not be root"
    home=$(getent passwd "$user" | cut -d: -f6)
    [ -d "$home" ] || home=${RAYDIFFUSION_STATE:-/}
    exec setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups -- env HOME="$home" USER="$user" bash "$self" "$@"
}

runs_python() {
    "$python" -c "" 2>/dev/null || fail "$(id -un) cannot run $python: run infra/setup.sh, in a folder that this user may read"
}

running() { # whether the supervisor of the state folder $1 is alive
    [ -s "$1/supervisor" ] && tr '\0' ' ' <"/proc/$(cat "$1/supervisor")/cmdline" 2>/dev/null | grep -qF "$(basename "$self") supervise"
}

below() { # every descendant of process $1, but for what looks for them
    local me=$BASHPID
    cat /proc/[0-9]*/stat 2>/dev/null | awk -v root="$1" -v self="$me" '
        { pid = $1; sub(/^.*\) . /, ""); of[$1] = of[$1] " " pid }
        END {
            todo = of[root]
            while (split(todo, pids, " ")) {
                todo = ""
                for (at in pids) if (pids[at] != self) { print pids[at]; todo = todo of[pids[at]] }
            }
        }'
}

end_all() { # SIGTERM to the process $1 (none: to all), which ends what it started in order; SIGKILL to what is left
    local end=$((SECONDS + 40)) first=$1 left
    left=$(below $$)
    kill -TERM ${first:-$left} 2>/dev/null || true
    while left=$(below $$); [ -n "$left" ]; do
        [ $SECONDS -lt $end ] && { [ -z "$first" ] || kill -0 "$first" 2>/dev/null; } || kill -KILL $left 2>/dev/null || true
        sleep 0.2
    done
}

end_supervisor() { # of the state folder $1, and with it all that it started; $2: what is said where there is none
    running "$1" || { say "$2"; return 0; }
    local pid
    pid=$(cat "$1/supervisor")
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
}
