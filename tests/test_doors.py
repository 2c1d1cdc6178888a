"""The pages at the doors of the rooms: their code blocks run, what they name exists, their keys are the code's."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.quickstart import write_digits
from pipeline.config import describe, load_config
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.model import load
from pipeline.serving.config import ServingConfig
from tests.end_to_end.small_run import ROOT
from tests.faults.endpoint import serving
from tests.serving.tiny import save_tiny

PAGES = sorted(
    path for pattern in ("*.md", "*/README.md", "pipeline/*/README.md", ".github/*.md") for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEYS = re.compile(r"(<!-- keys: .*? -->\n).*?(<!-- end of keys -->)", re.DOTALL)
ENDPOINT = "http://127.0.0.1:8000"


def blocks(page: str, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")) if found == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the digits' shards and a model of random weights where the quickstart leaves its own."""
    folder = tmp_path_factory.mktemp("doors")
    images, shards = folder / "artifacts/digits/images", folder / "artifacts/digits/shards"
    write_digits(images)
    for unneeded in (path for name in images.iterdir() for path in sorted(name.iterdir())[16:]):
        unneeded.unlink()
    shard_in_process(ShardConfig(str(images), str(shards), image_size=8, channels=1, resize="exact", held_out=0.2))
    save_tiny(str(folder / "artifacts/digits/run/model"))
    return folder


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_library_page_runs(folder: Path) -> None:
    """Its last block compares the sampler that it adds with the same one of ours."""
    code = blocks("pipeline/README.md", "python")
    assert len(code) == 3
    assert "tensor([" in run([sys.executable, "-c", "\n".join(code)], folder)


def test_the_endpoints_page_runs(folder: Path) -> None:
    model = str(folder / "artifacts/digits/run/model")
    page = "pipeline/serving/README.md"
    (folder / "digit.png").write_bytes(next((folder / "artifacts/digits/images").rglob("*.png")).read_bytes())
    with serving(load(model), ServingConfig(model=model)) as endpoint:
        code = "\n".join(blocks(page, "python"))
        assert code.count(ENDPOINT) == 2
        said = run([sys.executable, "-c", code.replace(ENDPOINT, endpoint.url)], folder)
        assert len(re.findall(r"[\d.]+ \+- [\d.]+ percentile", said)) == 2
        answers = [run(["bash", "-ec", text.replace(ENDPOINT, endpoint.url)], folder) for text in blocks(page, "")]
    assert len(answers) == 2
    assert "image_generation.completed" in answers[0]
    assert '"bits_per_dim"' in answers[1]


@pytest.mark.slow
def test_the_tutorial_runs_and_what_it_shows_is_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("RAYDIFFUSION_TUTORIAL_IMAGES", "4000")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    said = run([sys.executable, "-W", "error", "-m", "jobs.tutorial"], folder)
    made = folder / "artifacts/tutorial"
    assert all((made / name).stat().st_size > 1000 for name in ("loss.png", "samples.png", "samplers.png"))
    number = r"([+-]?[\d.]+)"
    found = re.search(rf"held-out bits/dim {number} \+- {number}; of one image \+- {number}", said)
    assert found
    bits, error, _ = map(float, found.groups())
    assert 0 < error < bits < 8
    distances = {
        name: [float(value) for value in re.findall(r"\d+\.\d+", said.split(f"\n{name} ")[1].splitlines()[0])]
        for name in ("euler", "heun")
    }
    assert distances["heun"][-1] < distances["euler"][-1] < distances["euler"][0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    code = BLOCK.sub("", text)
    for name in re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|yaml|json|sh|md|png|svg))`", code):
        roots = (page.parent, ROOT, ROOT / "pipeline")
        assert any((root / name).exists() for root in roots), name


def tree(page: str, first: str) -> list[str]:
    """The file names of a map: the first word of each line that begins with one."""
    [found] = [text for text in blocks(page, "") if text.startswith(first)]
    return [line.split()[0] for line in found.splitlines() if not line.startswith("   ")]


def test_the_map_has_every_room() -> None:
    rooms = tree("pipeline/README.md", "diffusion/")
    for name in rooms:
        assert (ROOT / "pipeline" / name).exists(), name
    folders = {path.parent.name + "/" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert folders == {name for name in rooms if name.endswith("/")}


def test_our_environment_names_of_the_pages_are_read_somewhere() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for where in ("pipeline", "jobs", "infra", "tests")
        for path in (ROOT / where).rglob("*")
        if path.suffix in (".py", ".sh", ".yaml")
    )
    for page in PAGES:
        for name in set(re.findall(r"\bRAYDIFFUSION_[A-Z0-9_]+\b", page.read_text(encoding="utf-8"))):
            assert name in source, f"{page}: {name}"


def with_keys(page: str) -> str:
    """The page with the keys of the run file as they are now."""
    keys = "\n".join(line.rstrip() for line in describe().splitlines())
    return KEYS.sub(lambda found: f"{found[1]}```text\n{keys}\n```\n{found[2]}", page)


def test_the_keys_are_those_of_the_run_file() -> None:
    page = (ROOT / "jobs/README.md").read_text(encoding="utf-8")
    assert KEYS.search(page)
    assert page == with_keys(page), "run: python -m tests.test_doors"


def commands(page: str) -> list[list[str]]:
    """The jobs that a page calls, in blocks or within a line, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^python -m .*$", "\n".join(blocks(page, "")), re.MULTILINE)
    found += [" ".join(code.split()) for code in re.findall(r"`(python\s+-m\s[^`]+)`", BLOCK.sub("", text))]
    jobs = [shlex.split(line, comments=True)[2:] for line in found]
    return [words for words in jobs if words[0].startswith("jobs.") and not {"--help", "jobs.VERB"} & {*words}]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=" ".join(words)) for page in PAGES for words in commands(str(page.relative_to(ROOT)))],
)
def test_a_job_takes_what_a_page_gives_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *arguments = words
    if verb == "jobs.benchmark":
        assert (ROOT / f"jobs/benchmark/{arguments[0]}.py").exists()
        return
    started: list[object] = []
    monkeypatch.setattr(cli, "main", started.append)
    monkeypatch.setattr(sys, "argv", [verb, *arguments])
    importlib.import_module(verb).main()  # a wrong argument ends the process
    assert len(started) == 1
    load_config(str(ROOT / "jobs/configs/digits.yaml"), [word for word in arguments if re.match(r"\w[\w.]*=", word)])


if __name__ == "__main__":
    door = ROOT / "jobs/README.md"
    door.write_text(with_keys(door.read_text(encoding="utf-8")), encoding="utf-8")
