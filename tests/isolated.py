"""Exports proved where fewstep cannot be imported: in a Python of their own, many in one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fewstep import proof
from fewstep.verify import OFFLINE

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import proof
for job in json.loads(sys.argv[2]):
    proof.main(*job)
"""


def proofs_of(bases: Mapping[str, str], root: Path, scratch: Path) -> dict[str, list[dict]]:
    """The findings on exports in `root` by name, each beside the name of its base there, or "" without one."""
    jobs = [[str(root / name), str(root / base) if base else "", str(scratch)] for name, base in bases.items()]
    command = [sys.executable, "-I", "-c", SCRIPT, str(Path(proof.__file__).parent), json.dumps(jobs)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE, cwd=scratch, check=False)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(bases, [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[{")], strict=True))
