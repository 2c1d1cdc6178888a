#!/usr/bin/env bash
# A Ray cluster of a few machines, closed by default: token, own user, own ports, loopback dashboard.
#   infra/cluster.sh head                 this machine is the head; makes the token where there is none
#   infra/cluster.sh join HOST:PORT       this machine is a node of that head (its line says the address)
#   infra/cluster.sh status               0 where this node is up; lists all nodes
#   infra/cluster.sh down                 ends all that head or join started here; their logs stay
#   infra/cluster.sh env                  prints what a shell needs for `ray job submit`: eval "$(infra/cluster.sh env)"
#   infra/cluster.sh unit head|join ...   prints a systemd unit
# --foreground (head, join) stays until SIGTERM. Further arguments after -- go to `ray start` (--num-gpus=2, --labels=...).
# From the environment:
#   RAYDIFFUSION_STATE   folder of token, logs and Ray's files, this user's alone [~/.raydiffusion]
#   RAYDIFFUSION_PORTS   the first of 1,000 ports, the same on all nodes [26000]; open them between the nodes, to nobody else
#   RAYDIFFUSION_USER    whom to become when called by root [raydiffusion]
#   RAY_JOB_STOP_WAIT_TIME_S   how long `ray job stop` waits for a checkpoint before it kills [120]
set -eu
umask 077
infra=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
self=$infra/cluster.sh
usage=14
. "$infra/common.sh"

verb=${1:-}
case "$verb" in
head | join | status | down | env) become_unprivileged "$@" ;;
unit | supervise) ;;
*) usage ;;
esac
shift
state=${RAYDIFFUSION_STATE:-$HOME/.raydiffusion}
first=${RAYDIFFUSION_PORTS:-26000}
token=$state/token
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_TMPDIR
export PATH="$here/.venv/bin:$PATH"
nodes() { PYTHONPATH="$here" "$python" -P -m pipeline.cluster.nodes "$@"; } # of this checkout, wherever it is called from

role='' address='' foreground='' more=()
parse() {
    if [ "$verb" = join ]; then
        address=${1:-}; [ -n "$address" ] || fail "join needs the head's address, HOST:PORT"; shift
        case "$address" in *:*) ;; *) address=$address:$first ;; esac
        local host=${address%:*} found
        found=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }')
        [ -n "$found" ] || fail "no host $host is known here"
        address=$found:${address##*:}
    elif [ "${1:-}" = "127.0.0.1:$first" ]; then
        address=$1; shift
    fi
    while [ $# -gt 0 ]; do
        case "$1" in
        --foreground) foreground=yes ;;
        --) shift; more=("$@"); break ;;
        *) fail "'$1' is not an option of $verb; what is Ray's comes after --" ;;
        esac
        shift
    done
    role=$verb
}

check_state() {
    [ "${#state}" -le 36 ] || fail "RAYDIFFUSION_STATE is $state, ${#state} characters; Ray's sockets lie in it and allow 36"
    runs_python
    mkdir -p "$state/logs" || fail "cannot make $state; name another folder with RAYDIFFUSION_STATE"
    chmod 700 "$state"
}

check_token() {
    if [ ! -s "$token" ]; then
        [ "$role" = head ] || fail "no token at $token: copy the head's file of that name there (scp), mode 0600"
        "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token.new"
        mv "$token.new" "$token"
    fi
    [ "$(stat -c %a "$token")" = 600 ] || fail "others may read $token: chmod 600 $token"
}

ray_start() {
    local options=(
        --block --disable-usage-stats --log-style=record --temp-dir="$state/ray" --node-name="$name"
        --labels="raydiffusion.environment=$(nodes environment)"
        --dashboard-agent-listen-port=$((first + 2)) --dashboard-agent-grpc-port=$((first + 3))
        --runtime-env-agent-port=$((first + 4)) --object-manager-port=$((first + 5)) --node-manager-port=$((first + 6))
        --metrics-export-port=$((first + 7)) --ray-client-server-port=$((first + 10)) --min-worker-port=$((first + 100)) --max-worker-port=$((first + 999))
    )
    [ -z "${RAYDIFFUSION_IP:-}" ] || options+=(--node-ip-address="$RAYDIFFUSION_IP")
    if [ "$role" = head ]; then
        options+=(--head --port="$first" --dashboard-host=127.0.0.1 --dashboard-port=$((first + 1)))
    else
        options+=(--address="$address")
    fi
    exec ray start "${options[@]}" "${more[@]}"
}

look() { # marks the node as healthy once it is; ends it where its environment is not the head's
    local code=0
    nodes wait "$address" "$name" $((first + 2)) 86400 2>"$state/refused" || code=$?
    [ $code = 3 ] && kill -TERM "$$" || rm -f "$state/refused"
    [ $code != 0 ] || touch "$state/healthy"
}

supervise() { # the node's first process, which adopts what loses its parent: asks again where Ray gives up, ends all at SIGTERM
    local asked='' ray=
    set -m # else all that is started here would ignore SIGINT, by which Ray cancels a task
    trap 'asked=yes' TERM INT
    export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"
    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pipeline.cluster.gate:middlewares # bounds what clients may send
    export AUTOSCALER_METRIC_PORT=$((first + 8)) DASHBOARD_METRIC_PORT=$((first + 9))
    cd "$state"
    ulimit -Sn "$(ulimit -Hn)" || true
    while [ -z "$asked" ]; do
        ray_start &
        ray=$!
        look &
        wait "$ray" || true
        rm -f "$state/healthy"
        [ -n "$asked" ] || say "Ray ended or gave up; it is asked again"
        end_all "$ray"
        [ -n "$asked" ] || sleep 3
    done
    find "$state"/ray/session_*/* -maxdepth 0 ! -name logs -exec rm -rf {} + 2>/dev/null || true
    rm -f "$state/supervisor"
}

start() {
    parse "$@"; check_state; check_token
    ! running "$state" || fail "a node is up here already (infra/cluster.sh status, down)"
    nodes ports "$first" "$role" || fail "free them, or take others on all nodes with RAYDIFFUSION_PORTS"
    rm -f "$state/healthy" "$state/refused"
    [ "$role" = head ] || may_join
    [ "$role" = join ] || address=127.0.0.1:$first
    echo "$address" >"$state/address"
    local command=("$python" -c "$adopting" bash "$self" supervise "$role" "$address" -- "${more[@]}")
    if [ -n "$foreground" ]; then
        echo $$ >"$state/supervisor"
        exec "${command[@]}"
    fi
    setsid "${command[@]}" </dev/null >>"$state/logs/node.log" 2>&1 &
    echo $! >"$state/supervisor"
    until_healthy
}

may_join() { # at once, where the head is up and refuses; a head that is not up yet is waited for
    local code=0 said
    said=$(nodes list "$address" 2>&1) || code=$?
    [ $code != 4 ] || fail "$(tail -n 1 <<<"$said"); copy the head's token file to $token"
}

until_healthy() {
    local end=$((SECONDS + ${RAYDIFFUSION_START_S:-180}))
    while [ ! -e "$state/healthy" ] && running "$state" && [ $SECONDS -lt $end ]; do sleep 0.2; done
    if [ ! -e "$state/healthy" ]; then
        ! running "$state" || down
        [ ! -s "$state/refused" ] || fail "$(cat "$state/refused")"
        fail "the node did not become healthy; the end of $state/logs/node.log: $(tail -n 3 "$state/logs/node.log" | tr '\n' ' ')"
    fi
    status
    [ "$role" = join ] || say "others join with: infra/cluster.sh join $(nodes list "$address" | awk '$1 == "head" { print $2 }'):$first"
}

status() {
    running "$state" || { say "no node is up here"; return 1; }
    [ -e "$state/healthy" ] || { say "a node is starting here; see $state/logs/node.log"; return 1; }
    nodes list "$(cat "$state/address")"
}

down() { end_supervisor "$state" "no node is up here"; }

environment() {
    printf 'export RAY_AUTH_MODE=token\nexport RAY_AUTH_TOKEN_PATH=%q\nexport RAY_API_SERVER_ADDRESS=http://127.0.0.1:%d\n' "$token" $((first + 1))
}

unit() {
    cat <<UNIT
# /etc/systemd/system/raydiffusion.service: systemctl enable --now raydiffusion
[Unit]
Description=raydiffusion: Ray node ($*)
Wants=network-online.target
After=network-online.target

[Service]
User=${RAYDIFFUSION_USER:-raydiffusion}
UMask=0077
NoNewPrivileges=yes
LimitNOFILE=65536
Environment=RAYDIFFUSION_PORTS=$first
ExecStart=/usr/bin/env bash $self $* --foreground
KillMode=mixed
TimeoutStopSec=60
Restart=always
RestartSec=5

[Install]
WantedBy=multi-user.target
UNIT
}

case "$verb" in
head | join) start "$@" ;;
supervise) verb=$1; shift; parse "$@"; name=$(hostname)-$$; supervise ;;
env) environment ;;
*) "$verb" "$@" ;;
esac
