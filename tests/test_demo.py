"""`fewstep demo`: what it would write over is looked at before it trains."""

import pytest

from fewstep import api, demo


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("results.json", "results.json is there and is no results file of fewstep"),
        ("run/results.json", "results.json is there and is no results file of fewstep"),
        ("report.html", "report.html is there and is no report of fewstep"),
        ("export/mine.txt", "export holds something that is not a fewstep export"),
        ("export", "export holds something that is not a fewstep export"),
        ("export/fewstep.json", "does not list the export's files"),
    ],
)
def test_what_the_demo_did_not_make_is_refused_before_training(tmp_path, monkeypatch, file, said):
    monkeypatch.setattr(api, "train", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("years of work")
    with pytest.raises(ValueError, match=said):
        demo.run(tmp_path)
    assert (tmp_path / file).read_text() == "years of work"


def test_an_empty_folder_is_trained_in(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "demo")
