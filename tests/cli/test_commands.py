"""What commands print, and with which code they end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from terminal import Result, is_refusal, settings

from fewstep import api, cli

ROOT = Path(__file__).parents[2]


def test_a_run_from_the_command_line(command, trained, tmp_path):
    done = command("train", trained[0], "--out", "run", "--set", "train.rounds=1")
    assert done.code == 0 and "trained: run/checkpoints/step-0000001" in done.out
    assert "train: 1/1" in done.err and "\r" not in done.err
    done = command("train", trained[0], "--out", "run", "--resume")
    assert done.code == 0 and "step-0000002" in done.out
    done = command("sample", "run", "--prompt", "a star", "--prompt", "a cross", "--steps", "1", "--steps", "2", "--out", "drawn")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "drawn/grid.png").size == (2 * 64 + 2, 2 * 64 + 2)
    assert sorted(f.name for f in (tmp_path / "drawn").iterdir()) == ["grid.png", "student-1", "student-2"]


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
