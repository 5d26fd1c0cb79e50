"""What commands print, and with which code they end."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image
from terminal import Result, contents, is_refusal, settings

from fewstep import __version__, api, cli

ROOT = Path(__file__).parents[2]


def test_a_run_from_the_command_line(command, trained, tmp_path):
    done = command("train", trained[0], "--out", "run", "--set", "train.rounds=1")
    assert done.code == 0 and "trained: run/checkpoints/step-0000001" in done.out
    assert "train: 1/1" in done.err and "\r" not in done.err
    done = command("train", trained[0], "--out", "run", "--resume")
    assert done.code == 0 and "step-0000002" in done.out
    done = command(
        "sample", "run", "--prompt", "a star", "--prompt", "a cross", "--steps", "1,2", "--steps", "4", "--out", "drawn"
    )
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "drawn/grid.png").size == (2 * 64 + 2, 3 * 64 + 4)
    assert sorted(f.name for f in (tmp_path / "drawn").iterdir()) == ["grid.png", "student-1", "student-2", "student-4"]


def test_pictures_of_an_earlier_call_are_gone_and_nothing_else_is(command, trained, tmp_path):
    words = ("--prompt", "a star", "--prompt", "a cross")
    assert command("sample", trained[1], *words, "--steps", "1,2", "--out", "drawn").code == 0
    (tmp_path / "drawn/student-2/mine.txt").write_text("a note")
    assert command("sample", trained[1], *words[:2], "--steps", "1", "--out", "drawn").code == 0
    left = {str(f.relative_to(tmp_path / "drawn")) for f in (tmp_path / "drawn").rglob("*") if f.is_file()}
    assert left == {"grid.png", "student-1/000000.png", "student-1/manifest.jsonl", "student-2/mine.txt"}
    (tmp_path / "drawn/student-1/manifest.jsonl").write_text("{")
    before = contents(tmp_path / "drawn")
    is_refusal(command("sample", trained[1], *words, "--out", "drawn"), "manifest.jsonl is damaged.*name another --out")
    assert contents(tmp_path / "drawn") == before


def test_a_teacher_that_takes_no_prompts_is_asked_for_none(command, config, folders, tmp_path, trained):
    done = command("train", config(teacher={"path": str(folders["ddpm"])}), "--out", "run")
    assert done.code == 0 and "next: fewstep sample run | fewstep export run" in done.out, done.err
    assert command("sample", "run", "--count", "3", "--out", "three").code == 0
    assert command("sample", "run", "--compare-teacher", "--out", "some").code == 0
    assert command("export", "run", "--to", "out", "--weights", "full").code == 0
    assert command("sample", "out", "--count", "3", "--out", "drawn").code == 0
    pictures = {name: sorted((tmp_path / name / "student-1").glob("*.png")) for name in ("three", "some", "drawn")}
    assert [len(files) for files in pictures.values()] == [3, 4, 3]
    assert len({file.read_bytes() for file in pictures["three"]}) == 3
    is_refusal(command("sample", trained[1], "--count", "3"), "nothing to draw; give --prompt TEXT or --prompts FILE")


def test_a_run_from_another_folder_or_its_own_and_how_to_go_on_from_there(command, trained, tmp_path, monkeypatch):
    """Its paths were relative; its own folder has a space in its name, and is where its own config goes on."""
    tree = yaml.safe_load(trained[0].read_text())
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data/words.txt").write_text("a star\n")
    tree["data"]["prompts"], tree["teacher"]["path"] = "my data/words.txt", os.path.relpath(tree["teacher"]["path"], tmp_path)
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(tree))
    done = command("train", "relative.yaml", "--out", "my run", "--set", "train.rounds=1")
    assert done.code == 0, done.err
    assert "next: fewstep sample 'my run' --prompt '...' | fewstep export 'my run' --to OUT" in done.out
    assert "fewstep eval 'my run' --reference FOLDER --prompts FILE" in done.out  # what the zoo is judged by is for the zoo
    assert "trained already" not in done.out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = command("train", "../my run/config.yaml", "--resume", "--set", "train.rounds=2")
    assert done.code == 0 and "trained: ../my run/checkpoints/step-0000002" in done.out, done.err
    done = command("train", "../my run/config.yaml", "--resume")
    assert done.code == 0 and "trained already (a higher train.rounds goes on): " in done.out
    assert command("sample", "../my run", "--prompt", "a star").code == 0
    monkeypatch.chdir(tmp_path / "my run")
    done = command("train", "config.yaml", "--resume", "--set", "train.rounds=3")
    assert done.code == 0 and "trained: checkpoints/step-0000003" in done.out, done.err


def test_alone_it_is_help_and_it_knows_its_version(command):
    for arguments, said in ((), "Usage: fewstep"), (("--version",), f"fewstep {__version__}"), (("-h",), "Usage: fewstep"):
        done = command(*arguments)
        assert (done.code, done.err) == (0, "") and done.out.startswith(said)


def test_a_warning_is_one_line(command):
    command("--version")
    assert warnings.formatwarning("many\n  words", UserWarning, "/a/file.py", 172) == "fewstep: many words\n"


def test_configs_are_listed_wherever_one_is_and_where_there_are_none_it_says_so(command, monkeypatch):
    from fewstep import listing

    if (ROOT / "configs").exists():
        assert "configs/sprites-sd-" in command("list", "configs").out
    monkeypatch.setattr(listing, "PLACES", (Path("configs"),))
    assert command("list", "configs").out == "there is no folder configs here; a checkout of fewstep has one\n"
    assert json.loads(command("list", "configs", "--json").out) == []


@pytest.mark.parametrize(
    "arguments", [("doctor",), ("list", "objectives"), ("list", "teachers"), ("list", "configs"), ("plan", None)]
)
def test_json_is_json(command, config, arguments):
    given = [config() if a is None else a for a in arguments]
    done = command(*given, "--json")
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out) is not None
    plain = command(*given)
    assert plain.code == 0
    if given[0] != "list" or given[1] != "configs":
        assert len(plain.out.splitlines()) > 1


def test_a_failed_proof_is_exit_code_2(command, monkeypatch):
    import fewstep.verify
    from fewstep.verify import Check, Report

    monkeypatch.setattr(fewstep.verify, "verify", lambda *_: Report(False, (Check("times", False, "off by one"),)))
    done = command("verify", "export")
    assert (done.code, done.out) == (2, "NOT times: off by one\n")
    monkeypatch.setattr(fewstep.verify, "verify", lambda *_: Report(True, (Check("times", True, "0"),)))
    assert command("verify", "export").code == 0


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(command, trained, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", stopped)
    done = command("train", trained[0], "--out", trained[1])
    assert done.code == 130
    assert done.out == f"stopped; to go on: fewstep train {trained[1]}/config.yaml --out {trained[1]} --resume\n"
    done = command("train", trained[0], "--out", "new")
    assert done.code == 130 and done.out == "stopped; to go on: the same command, for nothing was begun\n"


def test_our_own_fault_is_a_traceback(command, trained, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "train", broken)
    monkeypatch.setattr(sys, "argv", ["fewstep", "train", str(trained[0])])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


# Real processes


def process(*command, **environment):
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    merged.pop("TQDM_DISABLE", None)
    return subprocess.run([sys.executable, *map(str, command)], env=merged, capture_output=True, text=True, check=False)


def test_help_needs_nothing_heavy():
    """Every command's: what they do is imported when they do it."""
    script = """
import sys
from fewstep import cli
for word in ("", "train", "sample", "plan", "eval", "export", "verify", "push", "demo", "doctor", "list", "report"):
    sys.argv = ["fewstep", *word.split(), "--help"]
    try:
        cli.main()
    except SystemExit as done:
        assert not done.code, word
print(sorted({"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "PIL", "yaml"} & sys.modules.keys()))
"""
    done = process("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("Usage: fewstep") == 12


def test_nothing_but_the_sentence_is_on_stderr(teacher, tmp_path):
    """With a teacher that is really loaded, whose libraries have much to say."""
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(teacher, tmp_path / "prompts.txt")))
    done = process("-m", "fewstep", "train", tmp_path / "config.yaml", "--out", tmp_path / "run", FEWSTEP_CACHE=str(tmp_path))
    is_refusal(Result(done.returncode, done.stdout, done.stderr), "is not UTF-8 .*save it as UTF-8")
    assert not (tmp_path / "run").exists()


def test_a_plan_is_yaml_and_whatever_the_libraries_say_of_it_is_not_the_users():
    """Captions of images are not known beforehand; the one that stands in for them is longer than this teacher reads."""
    config = ROOT / "configs/sprites-sd-hyper-sd-lora.yaml"
    plain, told = (process("-m", "fewstep", "plan", config, *more) for more in ((), ("--json",)))
    assert (plain.returncode, plain.stderr, told.stderr) == (0, "", "")
    assert yaml.safe_load(plain.stdout) == json.loads(told.stdout) and "&id" not in plain.stdout
