"""infra/Dockerfile: clean by hadolint, its context without data and keys, and one real build that shards."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.small_run import ROOT

DOCKERFILE = ROOT / "infra" / "Dockerfile"
BUILD = ["buildah", "--storage-driver", "vfs"]
PACKAGES = "python3,python3-venv,ca-certificates"


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text("FROM python:latest\nRUN cd /tmp\nMAINTAINER me\n")
    assert subprocess.run([hadolint, str(spoilt)], capture_output=True).returncode != 0


def test_it_copies_what_is_there_and_nothing_else() -> None:
    text = DOCKERFILE.read_text()
    sources = [word for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert sources
    allowed = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().split()
    assert allowed[0] == "*"
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(line[1:]) or source == line[1:] for line in allowed if line.startswith("!")), (
            source
        )
    assert "." not in sources
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|SECRET|PASSWORD)", text, re.MULTILINE)


FIFTY = """
import shutil
from pathlib import Path
from jobs.quickstart import write_digits
write_digits(Path("/tmp/all"))
for path in sorted(Path("/tmp/all").rglob("*.png"))[::36][:50]:
    place = Path("/tmp/artifacts/digits/images") / path.parent.name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
"""


def pips_own_places() -> list[str]:
    """The folders and files that pip is told of on this machine, and its configuration, mounted for the build."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    places = {*re.findall(r"(?<![\w:/])(?:file://)?(/[\w./-]+)", told), "/etc/pip.conf"}
    return [f"--volume={place}:{place}:ro" for place in sorted(places) if Path(place).exists()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("mmdebstrap")),
    reason="needs root, buildah and mmdebstrap",
)
def test_it_builds_and_shards_as_another_user(tmp_path: Path) -> None:
    storage = ["--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run")]

    def buildah(*words: str) -> str:
        done = subprocess.run([*BUILD, *storage, *words], capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    base = tmp_path / "base.tar"
    made = subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    empty = buildah("from", "scratch")
    buildah("add", empty, str(base), "/")
    buildah("commit", empty, "base")
    arguments = [f"--build-arg={name}" for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")]
    buildah(
        *("build", "--isolation", "chroot", "--build-arg=BASE=localhost/base", *arguments, *pips_own_places()),
        *("--ignorefile", f"{DOCKERFILE}.dockerignore", "-f", str(DOCKERFILE), "-t", "raydiffusion", str(ROOT)),
    )
    size = int(
        buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.User}}", "raydiffusion") == "1000:1000"
    )
    assert size == 1
    container = buildah("from", "raydiffusion")
    mounted = Path(buildah("mount", container))
    total = sum(path.lstat().st_size for path in (mounted / "app").rglob("*"))
    assert total < 2.5 * 2**30
    assert not [path for path in (mounted / "app").rglob("*") if path.name in (".git", "artifacts", "tests")]
    buildah("umount", container)
    job = f"python -c {shlex.quote(FIFTY)} && python -m jobs.shard jobs/configs/digits.yaml root=/tmp && id -u"
    said = buildah("run", "--isolation", "chroot", container, "--", "bash", "-c", job)
    assert said.splitlines()[-1] == "1000"
    train, held_out = map(int, re.findall(r"(\d+) (?:training|held-out)", " ".join(said.split())))
    assert train + held_out == 50
