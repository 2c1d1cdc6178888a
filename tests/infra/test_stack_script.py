"""infra/stack.sh: MLflow with users on PostgreSQL and S3, and Prometheus, on one host's loopback."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.small_run import ROOT
from tests.infra.hosts import Done, Host, clean_environment, idle_seconds, needs_hosts, two_hosts

SCRIPT = str(ROOT / "infra" / "stack.sh")
MLFLOW, PROMETHEUS = "http://127.0.0.1:27002", "http://127.0.0.1:27003"
EXPERIMENTS = f"{MLFLOW}/api/2.0/mlflow/experiments/search?max_results=1"
LOG = """
import mlflow
mlflow.set_experiment("stack")
with mlflow.start_run(run_name="kept"):
    mlflow.log_metric("loss", 0.5)
    mlflow.log_text("artifact", "a.txt")
    print(mlflow.get_artifact_uri())
"""
READ = """
import mlflow
[run] = mlflow.search_runs(experiment_names=["stack"], output_format="list")
print(run.info.run_name, run.data.metrics["loss"])
"""


def stack(*words: str, **settings: str) -> Done:
    environment = {**clean_environment(), **settings}
    return subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked to become another user")
def test_root_starts_nothing(tmp_path: Path) -> None:
    done = stack("up", RAYDIFFUSION_USER="root", RAYDIFFUSION_STATE=str(tmp_path / "s"))
    assert done.returncode == 1
    assert done.stderr == "stack: RAYDIFFUSION_USER must not be root\n"
    assert not (tmp_path / "s").exists()


def test_without_a_verb_it_says_how_it_is_called() -> None:
    done = stack()
    assert done.returncode == 2
    for verb in ("up", "status", "down", "dump FOLDER", "restore FOLDER", "env"):
        assert f"infra/stack.sh {verb}" in done.stderr


def curl(host: Host, url: str, *more: str) -> str:
    return host.run("curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", *more, url).stdout


def missing() -> list[str]:
    return [tool for tool in ("prometheus", "curl") if shutil.which(tool) is None] + (
        [] if list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) else ["postgresql"]
    )


@needs_hosts
@pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_used_and_down() -> None:
    with two_hosts() as (host, _):
        before = host.shared_memory()
        began = time.monotonic()
        done = host.script("stack.sh", "up", timeout=450, RAYDIFFUSION_START_S="400")
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began < idle_seconds(90)

        secrets = host.folder / "alpha" / "stack" / "secrets"
        assert secrets.stat().st_mode & 0o777 == 0o600
        assert secrets.parent.stat().st_mode & 0o777 == 0o700
        assert all(where.startswith("127.0.0.1:") for where in host.listening()), host.listening()
        hidden = [line.partition("=")[2] for line in secrets.read_text().split()]
        assert len(hidden) == 5
        assert not [line for line in host.processes() if any(secret in line for secret in hidden)]
        users = host.run("ps", "-eo", "user=,args=").stdout.splitlines()
        assert not [line for line in users if line.startswith("root") and "mlflow" in line]

        _who_gets_in(host, hidden[1])
        rules = json.loads(host.run("curl", "-s", f"{PROMETHEUS}/api/v1/rules").stdout)["data"]["groups"]
        assert {rule["name"] for group in rules for rule in group["rules"]} >= {"TrainingStalled", "EndpointErrors"}

        exported = host.script("stack.sh", "env").stdout
        done = host.run("bash", "-c", f"{exported}\npython -c '{LOG}'")
        assert "mlflow-artifacts:/" in done.stdout, done.stderr
        _a_dump_brings_back_what_was_deleted(host, exported)
        for time_of_it in range(2):  # ended and begun again: what was written is still there
            assert host.script("stack.sh", "down").returncode == 0
            assert host.processes() == []
            assert host.listening() == set()
            assert host.shared_memory() == before
            if time_of_it == 0:
                done = host.script("stack.sh", "up", timeout=450, RAYDIFFUSION_START_S="400")
                assert done.returncode == 0, done.stderr
                done = host.run("bash", "-c", f"{exported}\npython -c '{READ}'")
                assert done.stdout.strip() == "kept 0.5", done.stderr


def _a_dump_brings_back_what_was_deleted(host: Host, exported: str) -> None:
    kept = host.folder / "kept"
    kept.mkdir()
    kept.chmod(0o777)
    assert host.script("stack.sh", "dump", str(kept)).returncode == 0
    assert {path.name: path.stat().st_mode & 0o777 for path in kept.iterdir()} == {
        "mlflow.dump": 0o600,
        "mlflow_users.dump": 0o600,
    }
    gone = "import mlflow; [mlflow.delete_run(r.info.run_id) for r in mlflow.search_runs(search_all_experiments=True, "
    gone += 'output_format="list")]'
    done = host.run("bash", "-c", f"{exported}\npython -c '{gone}'")
    assert done.returncode == 0, done.stderr
    assert host.run("bash", "-c", f"{exported}\npython -c '{READ}'").returncode != 0
    done = host.script("stack.sh", "restore", str(kept))
    assert done.returncode == 0, done.stderr
    done = host.run("bash", "-c", f"{exported}\npython -c '{READ}'")
    assert done.stdout.strip() == "kept 0.5", done.stderr


def _who_gets_in(host: Host, password: str) -> None:
    assert curl(host, EXPERIMENTS) == "401"
    assert curl(host, EXPERIMENTS, "-u", f"admin:{password}") == "200"
    assert curl(host, EXPERIMENTS, "-u", "admin:wrong") == "401"
    for name in ("evil.example", "mlflow.ml.svc:5000"):  # one that nobody named
        assert curl(host, EXPERIMENTS, "-u", f"admin:{password}", "-H", f"Host: {name}") == "403"
