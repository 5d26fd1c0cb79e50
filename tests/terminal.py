"""What a command says and leaves."""

import re
from pathlib import Path


def settings(teacher, prompts):
    return {
        "teacher": {"path": str(teacher), "guidance": 2.0},
        "student": {"rank": 2},
        "critic": {"rank": 2},
        "objective": {"name": "dmd", "steps": 1, "critic_turns": 1},
        "data": {"prompts": str(prompts)},
        "train": {"rounds": 2, "batch": 1, "save_every": 1, "log_every": 1, "device": "cpu"},
    }


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def contents(*folders):
    return {
        str(f): f.read_bytes() for folder in folders for f in Path(folder).rglob("*") if f.is_file() and "cache" not in f.parts
    }


def is_refusal(result, said):
    lines = result.err.strip().splitlines()
    assert result.code == 2, (result.code, result.out, result.err)
    assert 1 <= len(lines) <= 2 and lines[0].startswith("fewstep: "), result.err
    assert "Traceback" not in result.err + result.out and result.out == ""
    assert re.search(said, result.err), result.err
