import pytest

from fewstep.data import read_prompts
from fewstep.zoo import sprites


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a cat\n\n  \n un été \n"),
        ("a.TXT", "a cat\r\nun été"),
        ("a.txt", b"\xef\xbb\xbf" + "a cat\nun été\n".encode()),
        ("a.jsonl", '{"prompt": "a cat", "text": "no"}\n\n{"caption": "un été"}\n{"text": " "}\n'),
        ("a.csv", "id,Caption\n1,a cat\n\n2, un été\n"),
        ("a.csv", b"\xef\xbb\xbf" + "prompt\na cat\nun été\n".encode()),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == ["a cat", "un été"]


def test_a_prompt_may_hold_commas_quotes_and_line_breaks_in_csv(tmp_path):
    assert read_prompts(write(tmp_path, "a.csv", 'prompt\n"a ""red"" cat,\nasleep"\n')) == ['a "red" cat,\nasleep']


def test_a_line_separator_inside_a_prompt_does_not_split_it(tmp_path):
    assert read_prompts(write(tmp_path, "a.txt", "a\u2028b\n")) == ["a\u2028b"]
    assert read_prompts(write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\n')) == ["a\u2028b"]


def test_zoo_prompts_are_the_captions_of_their_seed(monkeypatch):
    monkeypatch.setattr(sprites, "captions", lambda seed, n, world: [f"{n} captions of {world}, seed {seed}"])
    assert read_prompts("zoo:sprites") == ["8192 captions of sprites, seed 50000"]
    assert read_prompts("zoo:clouds") == ["8192 captions of clouds, seed 50000"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "a.txt holds no prompts; write at least one"),
        ("a.txt", "\n \n", "a.txt holds no prompts; write at least one"),
        ("a.csv", "", "a.csv holds no prompts; write at least one"),
        ("a.csv", "prompt\n", "a.csv holds no prompts; write at least one"),
        ("a.txt", b"ok\nab\xe9\n", r"a.txt is not UTF-8 \(byte 5, line 2\); save it as UTF-8"),
        ("a.txt", b"\xef\xbb\xbfok\nab\xe9\n", r"a.txt is not UTF-8 \(byte 8, line 2\); save it as UTF-8"),
        ("a.csv", "prompt\ncafé".encode("latin-1"), r"a.csv is not UTF-8 \(byte 10, line 2\); save it as UTF-8"),
        ("a.jsonl", "a cat".encode("utf-16"), r"a.jsonl is not UTF-8 \(byte 0, line 1\); save it as UTF-8"),
        ("a.json", "[]", "a.json ends in '.json'; save prompts as .txt"),
        ("prompts", "a cat", "prompts ends in 'no suffix'; save prompts as .txt"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3 is not JSON .*; write one object a line"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', r'a.jsonl, line 2 is not an object; write \{"prompt": "..."\}'),
        ("a.jsonl", '{"text": "a"}\n{"title": "b"}', r"a.jsonl, line 2 has none of .*it has 'title'\); rename the one"),
        ("a.jsonl", '{"prompt": 7}', "a.jsonl, line 1: 'prompt' is 7, which is no text; write it in quotes"),
        ("a.csv", "id,title\n1,a\n", r"the header of .*a.csv has none of 'prompt', .*it has 'id', 'title'\); rename the one"),
        ("a.csv", "id,prompt\n1,a\n2\n", r"a.csv, line 3 has none of .*rename the one"),
        ("a.csv", "prompt\n" + "x" * 140_000, r"a.csv, line \d is not CSV \(.*limit.*\); quote fields"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_the_remedy(tmp_path, name, content, says):
    with pytest.raises(ValueError, match=says):
        read_prompts(write(tmp_path, name, content))


def test_a_source_that_is_no_file_is_said_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="no file of prompts at .*gone.txt; give a .txt, .jsonl or .csv file, or zoo:sprites"):
        read_prompts(str(tmp_path / "gone.txt"))
    with pytest.raises(ValueError, match="is a folder; .*data.images"):
        read_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="no prompts at zoo:cats; the embedded worlds are zoo:sprites and zoo:clouds"):
        read_prompts("zoo:cats")
