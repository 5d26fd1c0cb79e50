"""Push: nothing reaches a hub but by `fewstep push`, after the card was shown and somebody said yes."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from fewstep import cli, proof, push
from fewstep.push import pack, send

CARD = "---\nlicense: mit\n---\n\n```python\nfolder = 'out'  # where this folder lies, or its hub id\n```\n"


FACTS = {  # what all who read fewstep.json rely on
    "format": proof.FORMAT,
    "teacher": {"path": "owner/teacher"},
    "base_pipeline": "StableDiffusionPipeline",
    "pipeline": "StableDiffusionPipeline",
    "components": ["unet"],
    "runs_by": None,
    "form": "full",
    "sampler": "ddim",
    "steps": 4,
    "times": {},
    "call": {},
}
# so its snippet says where nothing but a folder will do
OWN = CARD.replace(", or its hub id", "")


class Hub:
    """A hub in memory: repository -> file -> bytes. It stands in for HfApi, whose methods it has."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0

    def repo_exists(self, repo_id: str) -> bool:
        return repo_id in self.repositories

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        self.repositories[repo_id], self.private[repo_id] = {".gitattributes": b""}, private

    def list_repo_files(self, repo_id: str) -> list[str]:
        return list(self.repositories[repo_id])

    def create_commit(self, repo_id: str, operations, *, commit_message: str) -> None:
        self.commits += 1
        for operation in operations:
            with operation.as_file() as file:
                self.repositories[repo_id][operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    return made


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "fewstep.json").write_text(json.dumps(FACTS))
    (folder / "README.md").write_text(CARD)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("secret")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "told.cpython-311.pyc").write_bytes(b"")
    return folder


def command(monkeypatch, *words: object, answer: str | None = None) -> int:
    """The exit code of `fewstep push ...`. answer: what the person at the terminal types; None: there is none."""
    monkeypatch.setattr(sys, "argv", ["fewstep", "push", *map(str, words)])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text: answer == "y")
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0


def test_a_push_sends_the_files_and_the_card_with_the_hub_id(hub, out, monkeypatch, capsys):
    assert command(monkeypatch, out, "me/four", "--yes") == 0
    sent = hub.repositories["me/four"]
    assert set(sent) == {".gitattributes", "README.md", "fewstep.json", "scheduler/scheduler_config.json"}
    assert sent["README.md"].decode() == CARD.replace(
        "folder = 'out'  # where this folder lies, or its hub id", "folder = 'me/four'"
    )
    assert sent["fewstep.json"] == (out / "fewstep.json").read_bytes()
    assert (out / "README.md").read_text() == CARD and not hub.private["me/four"] and hub.commits == 1
    said = capsys.readouterr().out
    assert (
        said.index("license: mit")
        < said.index("scheduler/scheduler_config.json")
        < said.index("pushed: https://huggingface.co/me/four")
    )


@pytest.mark.parametrize(("words", "answer"), [(["--dry-run"], None), (["--dry-run", "--yes"], None), ([], "n")])
def test_nothing_is_sent_without_a_yes(hub, out, monkeypatch, capsys, words, answer):
    assert command(monkeypatch, out, "me/four", *words, answer=answer) == 0
    assert "license: mit" in capsys.readouterr().out and not hub.repositories


def test_a_yes_at_the_terminal_sends(hub, out, monkeypatch):
    assert command(monkeypatch, out, "me/four", "--private", answer="y") == 0
    assert hub.private["me/four"] and hub.commits == 1


def test_where_nobody_can_be_asked_nothing_is_sent(hub, out, monkeypatch, capsys):
    assert command(monkeypatch, out, "me/four") == 2
    assert "add --yes" in capsys.readouterr().err and not hub.repositories


def test_an_export_is_sent_again_over_itself_and_over_nothing_else(hub, out):
    send(pack(out, "me/four"))
    hub.repositories["me/four"]["grid.png"] = b"mine"
    (out / "README.md").write_text(CARD + "more\n")
    send(pack(out, "me/four"))
    assert hub.repositories["me/four"]["README.md"].endswith(b"more\n") and hub.repositories["me/four"]["grid.png"] == b"mine"
    hub.repositories["me/thesis"] = {"thesis.tex": b"years of work"}
    with pytest.raises(ValueError, match="not a fewstep export"):
        send(pack(out, "me/thesis"))
    assert hub.repositories["me/thesis"] == {"thesis.tex": b"years of work"}


def add(name: str):
    return lambda out: (out / name).write_bytes(b"")


def link(out: Path) -> None:
    (out / "link").symlink_to(out / ".cache" / "token")


@pytest.mark.parametrize(
    ("hub_id", "change", "says"),
    [
        ("four", None, "names no owner"),
        ("me/four/five", None, "write OWNER/NAME"),
        ("me/four", lambda out: (out / "fewstep.json").unlink(), "not a fewstep export"),
        ("me/four", lambda out: (out / "fewstep.json").write_text("[]"), "out: fewstep.json is damaged"),
        ("me/four", lambda out: (out / "README.md").unlink(), "has no README.md"),
        ("me/four", add("optimizer.bin"), "is a pickle"),
        ("me/four", link, "link is a link"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_network(hub, out, hub_id, change, says):
    if change:
        change(out)
    with pytest.raises(ValueError, match=says):
        pack(out, hub_id)
    assert not hub.repositories


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required, but no token found.\nMore."),
        OfflineModeIsEnabled("Cannot reach it."),
        httpx.ConnectError("Name or service not known"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_refuses_or_is_not_there_is_a_sentence(hub, out, monkeypatch, capsys, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "repo_exists", refuse)
    assert command(monkeypatch, out, "me/four", "--yes") == 2
    said = capsys.readouterr().err
    assert "hf auth login" in said and said.count("\n") == 1


@pytest.mark.parametrize("teacher", ["/home/me/teacher", "zoo:sprites-sd"])
def test_what_others_will_miss_is_said(out, teacher):
    facts = {**FACTS, "form": "lora", "lora": {}, "teacher": {"path": teacher}}
    (out / "fewstep.json").write_text(json.dumps(facts))
    (out / "README.md").write_text(CARD.replace("license: mit\n", ""))
    notes = pack(out, "me/four").notes
    assert len(notes) == 2 and f"others cannot load this LoRA's teacher, {teacher};" in notes[0] and "no licence" in notes[1]


def test_a_run_is_exported_and_then_pushed(hub, out, monkeypatch):
    run = out.parent
    (run / "config.yaml").write_text("")

    class Run:
        def __init__(self, folder: Path) -> None:
            assert folder == run

        def export(self, to: Path) -> Path:
            assert to == run / "export"
            return out

    monkeypatch.setattr("fewstep.api.Run", Run)
    assert command(monkeypatch, run, "me/four", "--yes") == 0
    assert "fewstep.json" in hub.repositories["me/four"]


def test_the_card_of_an_export_with_its_own_pipeline_downloads_it(out):
    (out / "README.md").write_text(OWN)
    assert "snapshot_download\n\nfolder = snapshot_download('me/four')\n" in pack(out, "me/four").card
