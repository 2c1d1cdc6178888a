"""infra/README.md: its commands exist, its symptoms are what the code says."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cluster import nodes
from tests.end_to_end.small_run import ROOT

TEXT = (ROOT / "infra" / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
ROWS = [line for line in TEXT.partition("| symptom | command |")[2].splitlines()[2:] if line.startswith("|")]
SAID = (ROOT / "infra", ROOT / "pipeline", ROOT / "jobs")


@pytest.mark.parametrize("line", LINES)
def test_each_command_is_one_that_there_is(line: str) -> None:
    text = re.sub(r'^eval "\$\((.*)\)"', r"\1", line)
    words = shlex.split(text, comments=True)
    if words[0].startswith("infra/"):
        script = (ROOT / words[0]).read_text()
        assert re.search(rf"^#   {words[0]} .*\b{words[1]}\b|^#   {words[0]} {words[1]}\b", script, re.MULTILINE), line
        return
    assert words[:3] == ["ray", "job", "submit"], line
    module = words[words.index("-m") + 1]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    from pipeline.config import load_config

    overrides = [word for word in words[words.index("-m") + 2 :] if "=" in word]
    assert load_config("jobs/configs/digits.yaml", overrides).output.startswith("/shared/lab/")


def test_the_table_of_ports_is_that_of_the_code() -> None:
    table = TEXT.partition("| first port + |")[2].partition("\n\n")[0]
    found: set[int] = set()
    for cell in re.findall(r"^\| ([\d, to]+) \|", table, re.MULTILINE):
        low_high = [int(number) for number in re.findall(r"\d+", cell)]
        found |= set(range(low_high[0], low_high[-1] + 1)) if "to" in cell else set(low_high)
    assert {26000 + at for at in (*nodes.PORTS.values(), *nodes.HEAD_PORTS.values())} <= found
    assert {27000, 27001, 27002, 27003, 8000} <= found


def test_there_are_enough_symptoms_and_every_alert_named_exists() -> None:
    assert len(ROWS) >= 15
    rules = (ROOT / "infra" / "monitoring" / "rules.yaml").read_text()
    for alert in re.findall(r"alert `(\w+)`", TEXT):
        assert f"alert: {alert}\n" in rules


def test_quoted_symptoms_are_words_of_the_code() -> None:
    sources = [p.read_text() for folder in SAID for p in folder.rglob("*") if p.suffix in (".py", ".sh")]
    code = " ".join(" ".join(sources).split())
    ours = ("listens on already", "refuses this token", "others may read", "this node's environment is")
    ours += ("only this process would find", "asks for no token", "not on the PATH", "CheckpointFailed")
    for words in ours:
        assert any(words in row for row in ROWS), words
        assert words in code, words


def test_links_lead_somewhere() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / "infra" / path).exists(), path
    assert Path(ROOT / "infra" / "kuberay" / "kustomization.yaml").is_file()
