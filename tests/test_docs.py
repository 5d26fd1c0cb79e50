"""The commands in the README are run in their order, shrunk to seconds; its configs, objectives and families are real."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fewstep import cli
from fewstep.families import FAMILIES
from fewstep.objectives import objectives

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = "train.rounds=2 train.batch=2 train.save_every=1 train.preview_every=2 objective.critic_turns=1"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("fewstep ")]


def call(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", words)
    try:
        cli.main()
    except SystemExit as done:
        assert done.code in (0, None), words


def test_the_readme_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle on a grey background\na large blue star on a white background\n")
    quick = {
        "name": "quick",
        "prompts": "zoo:sprites",
        "n": 16,
        "seed": 1,
        "extractor": "zoo:sprites-clip",
        "reference": "zoo:sprites",
    }
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(quick))
    monkeypatch.chdir(tmp_path)
    ran = commands()
    assert {words[1] for words in ran} >= {"doctor", "list", "plan", "train", "sample", "eval", "export", "verify", "report"}
    for words in ran:
        if words[1] == "train":
            words = [*words, *(x for s in [*SMALL.split(), f"data.prompts={prompts}"] for x in ("--set", s))]
        if words[1] == "eval":
            words = ["quick.yaml" if w == "sprites-quick" else w for w in words] + ["--no-teacher"]
        call(monkeypatch, words)
    assert "ok " in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_the_readme_names_every_objective_and_family():
    assert all(f"| `{name}` |" in README for name in objectives())
    assert all(f"`{name}`" in README for name in FAMILIES)


def test_the_readme_config_is_one_that_parses():
    from fewstep.config import parse

    text = re.search(r"```yaml\n(.*?)```", README, re.S).group(1)
    assert parse(yaml.safe_load(text)).objective.steps == 4


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "eval/LEADERBOARD.md"])
def test_what_a_document_links_to_in_the_checkout_is_there(name):
    file = ROOT / name
    text = file.read_text()
    headings = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in re.findall(r"^#+ (.+)$", text, re.M)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = link.partition("#")
        assert "://" in link or (heading in headings if not place else (file.parent / place).exists()), link


def test_every_config_that_a_document_names_is_there():
    for name in ("README.md", "CONTRIBUTING.md"):
        for place in re.findall(r"configs/[\w/.-]+\.yaml", (ROOT / name).read_text()):
            assert (ROOT / place).exists(), f"{name}: {place}"


def test_config_headers_name_their_own_file():
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert str(file.relative_to(ROOT)) in file.read_text().split("teacher:")[0], file
