"""The commands of infra/README.md on two hosts: jobs submitted to a cluster beside a stack."""

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_run import small
from tests.infra.hosts import Done, Host, needs_hosts, two_hosts
from tests.infra.test_cluster_script import give_token
from tests.infra.test_stack_script import missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_hosts,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]
RUN_FILE = "jobs/configs/digits.yaml"
# the small run's settings, but for where things lie: that follows from root
SETTINGS = [each for each in small(Path("/x")) if "/x" not in each and not each.startswith("cluster.")]
WORKERS = ["cluster.workers=2", "cluster.cpus_per_worker=0.6"]  # of hosts with one core: one each


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Host, Host, Path]]:
    """A stack and a head on alpha, beta joined, and a folder that both see."""
    with two_hosts() as (alpha, beta):
        shared = alpha.folder / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        patient: dict[str, Any] = {"RAYDIFFUSION_START_S": "400"}
        done = alpha.script("stack.sh", "up", timeout=450, **patient)
        assert done.returncode == 0, done.stderr
        # what jobs are to know of MLflow and S3 stands in the environment of the nodes, not in that of a job
        secrets: dict[str, Any] = dict(
            re.findall(r"^export (\w+)=(\S+)$", alpha.script("stack.sh", "env").stdout, re.MULTILINE)
        )
        done = alpha.script("cluster.sh", "head", "--", "--num-cpus=1", timeout=450, **patient, **secrets)
        assert done.returncode == 0, done.stderr
        give_token(alpha, beta)
        done = beta.script("cluster.sh", "join", "alpha", "--", "--num-cpus=1", timeout=450, **patient)
        assert done.returncode == 0, done.stderr
        yield alpha, beta, shared


def submit(host: Host, module: str, *arguments: str) -> Done:
    exported = host.script("cluster.sh", "env").stdout
    script = f"{exported}\nray job submit --working-dir . -- python -m {module} {shlex.join(arguments)}"
    return host.run(
        *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "bash", "-c", script), timeout=500
    )


def test_the_jobs_in_order(site: tuple[Host, Host, Path]) -> None:
    alpha, beta, shared = site
    root, tracking = f"root={shared}", "tracking.uri=http://127.0.0.1:27002"

    began = time.monotonic()
    done = submit(alpha, "jobs.shard", RUN_FILE)
    assert done.returncode != 0
    assert "only this process would find output=artifacts/digits/run" in done.stdout + done.stderr
    assert time.monotonic() - began < 90  # ten seconds of its own, and Ray's client and driver on a busy machine

    done = submit(alpha, "jobs.quickstart", "--images-only", root)
    assert done.returncode == 0, done.stdout + done.stderr
    done = submit(alpha, "jobs.shard", RUN_FILE, root, tracking, *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,466 training and 331 held-out images" in " ".join(done.stdout.split())
    done = submit(alpha, "jobs.train", RUN_FILE, root, tracking, *SETTINGS, *WORKERS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained on 1,280 images" in done.stdout
    done = submit(alpha, "jobs.register", RUN_FILE, "--unmeasured", root, tracking, *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr

    assert (shared / "artifacts/digits/run/model/digests.json").is_file()
    assert list((shared / "artifacts/digits/run/checkpoints").rglob("commit.json"))
    for host in (alpha, beta):  # nothing that counts lies where Ray keeps its copies, but for the checkout's own files
        copies = host.folder / host.name / "ray"
        kept = [p for p in copies.rglob("*") if p.suffix in (".tar", ".db", ".safetensors") and "tests" not in p.parts]
        assert kept == []
