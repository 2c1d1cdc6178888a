"""The number of replicas follows the work: up under load, down to one, and to none where that is allowed, on a cluster
whose nodes come and go with them. No request is lost on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.serving.ports import is_free
from tests.serving.tiny import save_tiny

RAY = str(Path(sys.executable).parent / "ray")
MEMORY = 80 << 20
GCS = 6379  # where nodes that the autoscaler makes for a test look for their head
CLIENT = """
import json, sys, threading, time, warnings
warnings.simplefilter("ignore")
import httpx, ray
from ray import serve as ray_serve
from ray.serve.schema import ReplicaState
from pipeline.cluster import serve
from pipeline.serving.config import ServingConfig

PATIENCE_S = 400
model, floor, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
ray.init(address, log_to_driver=False, logging_level="ERROR")
url = serve.deploy(ServingConfig(
    model=model, port=0, min_replicas=floor, max_replicas=3, cpus_per_replica=1.5, cpus_ingress=0.1,
    work_per_replica_s=0.3, upscale_delay_s=1.0, downscale_delay_s=3.0, max_steps=1000, deadline_s=600.0,
))
seen, ended, failures, answers = [], threading.Event(), [], []

def ask():
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        while not ended.is_set():
            answer = client.post("/v1/images/generations", json={"n": 2, "steps": 500, "sampler": "ddim"})
            (answers if answer.status_code == 200 else failures).append(answer.text[:300])

def until(replicas, nodes):
    # waits as long as something moves: states of replicas, nodes, answers
    moved, end = None, 0.0
    while True:
        states = ray_serve.status().applications["raydiffusion"].deployments["engine"].replica_states
        now = (states.get(ReplicaState.RUNNING, 0), sum(node["Alive"] for node in ray.nodes()))
        if not seen or seen[-1] != now:
            seen.append(now)
        if now == (replicas, nodes):
            return
        if moved != (moved := (len(seen), len(answers), str(states))):
            end = time.monotonic() + PATIENCE_S
        assert time.monotonic() < end, (now, seen, failures)
        time.sleep(0.5)

threads = [threading.Thread(target=ask) for _ in range(8)]
try:
    for thread in threads:
        thread.start()
    until(3, 4)
finally:
    ended.set()
    for thread in threads:
        thread.join(PATIENCE_S)
until(floor, 1 + floor)
last = httpx.post(f"{url}/v1/images/generations", json={"steps": 2}, timeout=PATIENCE_S).status_code
print(json.dumps({"seen": seen, "answers": len(answers), "failures": failures, "last": last}))
serve.shutdown()
"""


def cluster_config() -> dict[str, Any]:
    """A head without room for a replica, and up to three nodes with room for one each, processes of this machine that
    Ray's own autoscaler starts."""
    worker = {"resources": {"CPU": 2, "object_store_memory": MEMORY}, "node_config": {}, "min_workers": 0}
    head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    unused = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "scaling",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,  # the nodes share one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"worker": {**worker, "max_workers": 3}, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        **{f"{name}_commands": [] for name in unused},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


def until_it_answers(port: int, head: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert head.poll() is None, "the head node ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError("no head node")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("floor", [1, 0])
def test_replicas_and_nodes_come_and_go_with_the_work(tmp_path: Path, floor: int) -> None:
    assert is_free("127.0.0.1", GCS), f"port {GCS} is taken: end the Ray cluster there first"
    save_tiny(str(tmp_path / "tiny"))
    (tmp_path / "cluster.yaml").write_text(json.dumps(cluster_config()))
    (tmp_path / "client.py").write_text(CLIENT)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_health_check_failure_threshold": "60",  # a busy machine's nodes are slow, not dead
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    }
    command = [
        *(RAY, "start", "--head", "--block", f"--port={GCS}", "--num-cpus=1", "--include-dashboard=false"),
        *(f"--object-store-memory={MEMORY}", f"--autoscaling-config={tmp_path}/cluster.yaml"),
    ]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        try:
            until_it_answers(GCS, head)
            asking = [
                sys.executable,
                str(tmp_path / "client.py"),
                str(tmp_path / "tiny"),
                str(floor),
                f"127.0.0.1:{GCS}",
            ]
            ran = subprocess.run(asking, env=environment, capture_output=True, text=True, timeout=3000, check=False)
        finally:
            started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.send_signal(signal.SIGTERM)
            head.wait(60)
            _, alive = psutil.wait_procs(started, timeout=5)
            for process in alive:
                process.kill()
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    told = next(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{"))  # Ray prints, too
    print(f"(replicas, nodes) seen: {told['seen']}; {told['answers']} answers, {len(told['failures'])} failed")
    assert not told["failures"]
    assert told["last"] == 200
