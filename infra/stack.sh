#!/usr/bin/env bash
# What stands beside a cluster, on this machine's loopback: PostgreSQL, MLflow with users, S3, Prometheus with our rules.
#   infra/stack.sh up [--foreground]   starts what is not up, makes secrets where there are none; healthy when it returns
#   infra/stack.sh status              0 where all answers
#   infra/stack.sh down                ends all that up started; data and logs stay in the state folder
#   infra/stack.sh dump FOLDER         MLflow's databases into FOLDER (artifacts are the bucket's own to copy)
#   infra/stack.sh restore FOLDER      and back, in place of what is there
#   infra/stack.sh env                 prints what a shell needs to use it: eval "$(infra/stack.sh env)"
# It installs nothing. From the environment:
#   RAYDIFFUSION_STATE, RAYDIFFUSION_USER   as for infra/cluster.sh
#   RAYDIFFUSION_STACK_PORTS   the first of four ports: PostgreSQL, S3, MLflow, Prometheus [27000]
#   RAYDIFFUSION_DATABASE      an existing database, postgresql://USER:PASSWORD@HOST/NAME; none is started then
#   RAYDIFFUSION_S3            an existing store, s3://bucket/prefix, its keys in AWS_*; none is started then.
#                              Without it moto keeps objects in memory: for a trial, they go with `down`
#   RAYDIFFUSION_MLFLOW_HOSTS  names by which MLflow is asked behind a proxy or a service, comma-separated [none]
set -eu
umask 077
infra=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
self=$infra/stack.sh
usage=16
. "$infra/common.sh"

verb=${1:-}
case "$verb" in
up | down | status | env | dump | restore) become_unprivileged "$@" ;;
supervise) ;;
*) usage ;;
esac
shift
state=${RAYDIFFUSION_STATE:-$HOME/.raydiffusion}/stack
first=${RAYDIFFUSION_STACK_PORTS:-27000}
database_port=$first s3_port=$((first + 1)) mlflow_port=$((first + 2)) prometheus_port=$((first + 3))
secrets=$state/secrets
export PATH="$here/.venv/bin:$PATH"
for folder in /usr/lib/postgresql/*/bin; do [ ! -d "$folder" ] || PATH=$PATH:$folder; done

own_database() { [ -z "${RAYDIFFUSION_DATABASE:-}" ]; }
own_s3() { [ -z "${RAYDIFFUSION_S3:-}" ]; }

check_tools() {
    local missing=''
    ! own_database || command -v initdb >/dev/null || missing="$missing postgresql"
    command -v prometheus >/dev/null || missing="$missing prometheus"
    [ -z "$missing" ] || fail "not on the PATH:$missing (Debian: apt-get install$missing)"
    "$python" -c 'import flask_wtf, psycopg' 2>/dev/null || fail "MLflow's users and the database driver are missing: infra/setup.sh server"
    ! own_s3 || "$python" -c 'import moto.server' 2>/dev/null || fail "no S3 is named and moto is missing: set RAYDIFFUSION_S3, or $here/.venv/bin/pip install 'moto[s3,server]'"
}

make_secrets() { # NAME=VALUE lines, read by this script alone; made once
    [ ! -s "$secrets" ] || return 0
    "$python" - >"$secrets.new" <<'PYTHON'
import secrets

for name in ("DATABASE_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "S3_KEY_ID", "S3_KEY"):
    print(f"{name}={secrets.token_hex(16)}")
PYTHON
    mv "$secrets.new" "$secrets"
}

settings() { # what the servers and their clients are told by environment, never on a command line
    . "$secrets"
    if own_database; then
        database=postgresql://raydiffusion:$DATABASE_PASSWORD@127.0.0.1:$database_port
    fi
    if own_s3; then
        export AWS_ACCESS_KEY_ID=$S3_KEY_ID AWS_SECRET_ACCESS_KEY=$S3_KEY AWS_DEFAULT_REGION=us-east-1
        export AWS_ENDPOINT_URL=http://127.0.0.1:$s3_port MLFLOW_S3_ENDPOINT_URL=http://127.0.0.1:$s3_port
    fi
    objects=${RAYDIFFUSION_S3:-s3://raydiffusion/lab}
}

with_driver() { printf 'postgresql+psycopg:%s' "${1#*:}"; }

# --- the servers ------------------------------------------------------------------------------------------------------

make_database() {
    [ ! -s "$state/database/PG_VERSION" ] || return 0
    rm -rf "$state/database.new"
    printf '%s' "$DATABASE_PASSWORD" >"$state/password"
    initdb --pgdata="$state/database.new" --username=raydiffusion --pwfile="$state/password" --auth=scram-sha-256 --encoding=UTF8 --locale=C >/dev/null
    rm "$state/password"
    printf "%s\n" "listen_addresses = '127.0.0.1'" "unix_socket_directories = ''" "dynamic_shared_memory_type = mmap" \
        "max_connections = 200" >>"$state/database.new/postgresql.conf"
    mv "$state/database.new" "$state/database"
}

run_database() { exec postgres -D "$state/database" -p "$database_port"; }
run_s3() { exec moto_server -H 127.0.0.1 -p "$s3_port"; }

run_mlflow() {
    local uri names="localhost:$mlflow_port,127.0.0.1:$mlflow_port" auth=$state/mlflow_users.ini
    uri=${RAYDIFFUSION_DATABASE:-$database/mlflow}
    printf '%s\n' '[mlflow]' 'default_permission = READ' "database_uri = $(with_driver "${RAYDIFFUSION_DATABASE:-$database/mlflow_users}" | sed 's/%/%%/g')" \
        'admin_username = admin' 'authorization_function = mlflow.server.auth:authenticate_request_basic_auth' >"$auth"
    export MLFLOW_BACKEND_STORE_URI MLFLOW_AUTH_CONFIG_PATH=$auth MLFLOW_AUTH_ADMIN_PASSWORD=$MLFLOW_PASSWORD
    MLFLOW_BACKEND_STORE_URI=$(with_driver "$uri")
    export MLFLOW_FLASK_SERVER_SECRET_KEY=$MLFLOW_SECRET_KEY MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    export MLFLOW_SERVER_ALLOWED_HOSTS=$names${RAYDIFFUSION_MLFLOW_HOSTS:+,$RAYDIFFUSION_MLFLOW_HOSTS}
    exec mlflow server --app-name basic-auth --host 127.0.0.1 --port "$mlflow_port" --workers 2 --artifacts-destination "$objects/mlflow"
}

run_prometheus() {
    sed -e "s|@RULES@|$infra/monitoring/rules.yaml|" -e "s|@RAY@|${state%/stack}/ray/prom_metrics_service_discovery.json|" \
        "$infra/monitoring/prometheus.yaml" >"$state/prometheus.yaml"
    exec prometheus --config.file="$state/prometheus.yaml" --storage.tsdb.path="$state/prometheus" --web.listen-address="127.0.0.1:$prometheus_port" --log.level=warn
}

prepare() { # databases and the bucket, once their servers answer
    "$python" - "$(own_database && echo "$database" || true)" "$(own_s3 && echo "$objects" || true)" <<'PYTHON'
import sys
import time

database, objects = sys.argv[1:]
end = time.monotonic() + 60


def until_it_works(what):
    while True:
        try:
            return what()
        except Exception as error:  # not up yet; the last one is shown
            if time.monotonic() > end:
                raise SystemExit(f"{type(error).__name__}: {error}")
            time.sleep(0.2)


def databases():
    import psycopg

    with psycopg.connect(f"{database}/postgres", autocommit=True) as connection:
        there = {row[0] for row in connection.execute("select datname from pg_database")}
        for name in {"mlflow", "mlflow_users"} - there:
            connection.execute(f"create database {name}")


def bucket():
    import boto3

    boto3.client("s3").create_bucket(Bucket=objects.removeprefix("s3://").split("/")[0])


if database:
    until_it_works(databases)
if objects:
    until_it_works(bucket)
PYTHON
}

keep() { # starts a server again whenever it ends
    local name=$1
    while :; do
        "run_$name" >>"$state/logs/$name.log" 2>&1 &
        wait $! || true
        say "$name ended; it is started again"
        sleep 3
    done
}

supervise() {
    local asked=''
    set -m
    trap 'asked=yes' TERM INT
    settings
    ! own_database || { make_database; keep database & }
    ! own_s3 || keep s3 &
    if prepare; then
        keep mlflow &
        keep prometheus &
    else
        asked=failed
    fi
    while [ -z "$asked" ]; do sleep 86400 & wait $! || true; done
    end_all ''
    rm -f "$state/supervisor"
}

# --- the verbs --------------------------------------------------------------------------------------------------------

answers() { # NAME URL
    local code
    code=$(curl -s -o /dev/null -m 5 -w '%{http_code}' "$2" || true)
    [ "$code" = 200 ] || { say "$1 does not answer at $2 ($code); see $state/logs"; return 1; }
}

all_answer() {
    answers MLflow "http://127.0.0.1:$mlflow_port/health" && answers Prometheus "http://127.0.0.1:$prometheus_port/-/ready"
}

up() {
    ! running "$state" || fail "the stack is up here already (infra/stack.sh status, down)"
    runs_python; check_tools
    mkdir -p "$state/logs" "${state%/stack}/ray"; chmod 700 "${state%/stack}" "$state"
    make_secrets
    if [ "${1:-}" = --foreground ]; then
        echo $$ >"$state/supervisor"
        exec "$python" -c "$adopting" bash "$self" supervise
    fi
    setsid "$python" -c "$adopting" bash "$self" supervise </dev/null >>"$state/logs/stack.log" 2>&1 &
    echo $! >"$state/supervisor"
    local end=$((SECONDS + ${RAYDIFFUSION_START_S:-180}))
    until all_answer 2>/dev/null; do
        if ! running "$state" || [ $SECONDS -ge $end ]; then
            all_answer || true
            down
            fail "the stack did not come up; the end of $state/logs/stack.log: $(tail -n 3 "$state/logs/stack.log" | tr '\n' ' ')"
        fi
        sleep 0.3
    done
    status
}

status() {
    running "$state" || { say "no stack is up here"; return 1; }
    all_answer || return 1
    printf '%-11s%s\n' MLflow "http://127.0.0.1:$mlflow_port  user admin, password in $secrets" \
        Prometheus "http://127.0.0.1:$prometheus_port" S3 "${RAYDIFFUSION_S3:-http://127.0.0.1:$s3_port (moto, in memory)}" \
        PostgreSQL "$(own_database && echo "127.0.0.1:$database_port" || echo "as named by RAYDIFFUSION_DATABASE")" \
        Grafana "add Prometheus as a source and import $infra/monitoring/*.json"
}

down() { end_supervisor "$state" "no stack is up here"; }

each_database() { # runs `$1 NAME FILE` with what PostgreSQL's tools read from the environment
    own_database || fail "the database is your own (RAYDIFFUSION_DATABASE): dump it where it is kept"
    running "$state" || fail "no stack is up here"
    settings
    export PGHOST=127.0.0.1 PGPORT=$database_port PGUSER=raydiffusion PGPASSWORD=$DATABASE_PASSWORD
    "$1" mlflow "$2/mlflow.dump" && "$1" mlflow_users "$2/mlflow_users.dump"
}
dump_one() { pg_dump --format=custom --file="$2.new" "$1" && mv "$2.new" "$2"; }
restore_one() { pg_restore --clean --if-exists --single-transaction --dbname="$1" "$2"; }
folder_of() { [ -n "${1:-}" ] && [ -d "$1" ] || fail "$verb needs a folder"; }
dump() { folder_of "$@"; each_database dump_one "$1"; }
restore() { folder_of "$@"; each_database restore_one "$1"; }

environment() {
    settings
    printf 'export MLFLOW_TRACKING_URI=http://127.0.0.1:%d\nexport MLFLOW_TRACKING_USERNAME=admin\nexport MLFLOW_TRACKING_PASSWORD=%q\n' "$mlflow_port" "$MLFLOW_PASSWORD"
    ! own_s3 || printf 'export %s=%q\n' AWS_ENDPOINT_URL "$AWS_ENDPOINT_URL" AWS_ACCESS_KEY_ID "$AWS_ACCESS_KEY_ID" \
        AWS_SECRET_ACCESS_KEY "$AWS_SECRET_ACCESS_KEY" AWS_DEFAULT_REGION us-east-1
}

case "$verb" in
env) [ -s "$secrets" ] || fail "no secrets here: infra/stack.sh up makes them"; environment ;;
*) "$verb" "$@" ;;
esac
