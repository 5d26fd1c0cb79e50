"""The command line on a tiny teacher: a run of two rounds, and what a command says and leaves."""

import sys
import warnings

import diffusers
import pytest
import transformers
import yaml
from terminal import Result, contents, is_refusal, settings

from fewstep import api, cli
from fewstep.config import parse
from fewstep.preview import Preview


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The bars of other packages; the command itself switches them off by an environment variable, before it imports them."""
    for package in (diffusers, transformers):
        package.utils.logging.disable_progress_bar()
    yield
    for package in (diffusers, transformers):
        package.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def teacher(folders):
    return folders["sd"]


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """(config file, run folder) of a run of two rounds."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(teacher, folder / "prompts.txt")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
        patch.setattr(Preview, "__call__", lambda *_: None)
        api.train(parse(yaml.safe_load(config.read_text())), folder / "run")
    return config, folder / "run"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """fewstep(*arguments) -> Result, in this process and in an empty folder."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # `main` sets it; here it must not outlive the test
    monkeypatch.setattr(Preview, "__call__", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else usage names `python -m pytest`, where that runs
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr()
        return Result(done.value.code or 0, said.out, said.err)

    return run


@pytest.fixture
def refused(command, trained, tmp_path):
    """refused(what it says, *arguments): the command is refused, in words, and every file is as it was."""

    def check(said, *arguments):
        before = contents(tmp_path, trained[0].parent)
        is_refusal(command(*arguments), said)
        assert contents(tmp_path, trained[0].parent) == before

    return check


@pytest.fixture
def config(teacher, tmp_path):
    """config(**parts) -> a config file; parts replace whole sections."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def write(**parts):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({**settings(teacher, tmp_path / "prompts.txt"), **parts}))
        return file

    return write
