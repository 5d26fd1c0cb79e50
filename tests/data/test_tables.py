"""Parquet files are written and read by pyarrow where it is installed, else by a stand-in with the few names that are used."""

import io
import json
import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fewstep.data import read_images

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def write(monkeypatch):
    """write(file, rows, group): one parquet file of rows (dicts of one shape), `group` rows a row group."""
    if pyarrow:

        def real(file, rows, group=2):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)

        return real
    standin = ModuleType("pyarrow")
    standin.ArrowException, standin.parquet = StandInError, SimpleNamespace(ParquetFile=StandIn)
    monkeypatch.setitem(sys.modules, "pyarrow", standin)
    return write_standin


class StandInError(Exception):
    pass


def write_standin(file, rows, group=2):
    file.write_text(
        json.dumps([rows[i : i + group] for i in range(0, len(rows), group)], default=lambda raw: raw.decode("latin-1"))
    )
    kinds = {name: kind(next((r[name] for r in rows if r[name] is not None), "")) for name in rows[0]}
    StandIn.kinds[file] = kinds


def kind(value):
    if isinstance(value, dict):
        return f"struct<{', '.join(f'{k}: {kind(v)}' for k, v in value.items())}>"
    return {bytes: "binary", str: "string", int: "int64"}[type(value)]


def bytes_again(value, kind):
    if isinstance(value, dict):
        return value | {"bytes": bytes_again(value["bytes"], "binary")}
    return value.encode("latin-1") if kind == "binary" and value is not None else value


class StandInSchema(list):
    names: list


class StandIn:
    kinds = {}  # noqa: RUF012

    def __init__(self, file):
        try:
            self.groups = json.loads(file.read_text())
        except ValueError as error:
            raise StandInError(error) from error
        self.types = self.kinds[file]
        self.num_row_groups = len(self.groups)
        self.metadata = SimpleNamespace(row_group=lambda i: SimpleNamespace(num_rows=len(self.groups[i])))

    @property
    def schema_arrow(self):
        schema = StandInSchema(SimpleNamespace(name=k, type=v) for k, v in self.types.items())
        schema.names = list(self.types)
        return schema

    def read_row_group(self, i, columns):
        rows = [{k: bytes_again(row[k], self.types[k]) for k in columns} for row in self.groups[i]]
        return SimpleNamespace(to_pylist=lambda: rows)


def png(i):
    raw = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(raw, "png")
    return raw.getvalue()


def row(i, raw=None):
    """As datasets' Image feature is stored."""
    return {"id": i, "image": {"bytes": raw or png(i), "path": f"{i}.png"}, "text": f"caption {i}"}


def test_tables_and_a_folder_of_the_same_images_are_one_set(tmp_path, write):
    """So their encodings are made once."""
    (tmp_path / "loose").mkdir()
    (tmp_path / "tables").mkdir()
    for i in range(7):
        (tmp_path / f"loose/{i}.png").write_bytes(png(i))
        (tmp_path / f"loose/{i}.txt").write_text(f"caption {i}")
    write(tmp_path / "tables/train-00000-of-00002.parquet", [row(i) for i in range(5)])
    write(tmp_path / "tables/train-00001-of-00002.parquet", [row(i) for i in (5, 6)])
    loose, tables = (read_images(str(tmp_path / name), SIZE) for name in ("loose", "tables"))
    assert (tables.captions, tables.digest) == (loose.captions, loose.digest)
    np.testing.assert_array_equal(tables.load([6, 0, 3, 4], SIZE), loose.load([6, 0, 3, 4], SIZE))
    assert read_images(str(tmp_path / "tables"), SIZE) == tables


def test_a_column_of_bytes_is_one_of_images(tmp_path, write):
    write(tmp_path / "a.parquet", [{"picture": png(i), "caption": f" caption\n{i}"} for i in range(3)])
    found = read_images(str(tmp_path / "a.parquet"), SIZE)
    assert found.captions == ("caption 0", "caption 1", "caption 2")
    assert [str(f) for f in found.files] == [f"row {i} of {tmp_path}/a.parquet" for i in range(3)]


def test_damaged_and_missing_images_in_tables_are_left_out_counted_and_named(tmp_path, write):
    rows = [row(0), row(1, png(1)[:-60]), row(2), row(3)]
    rows[2]["image"]["bytes"] = None
    write(tmp_path / "a.parquet", rows)
    with pytest.warns(UserWarning, match="2 of the 4 images in .* cannot be read and are left out .first: row 1 of .*a.parquet"):
        found = read_images(str(tmp_path), SIZE)
    assert found.captions == ("caption 0", "caption 3")
    assert found.load([1], SIZE).shape == (1, 8, 8, 3)


def test_rows_without_a_caption_are_counted_and_the_first_named(tmp_path, write):
    write(tmp_path / "a.parquet", [row(0), row(1) | {"text": None}, row(2) | {"text": " "}])
    says = "2 of the 3 images in .* have no caption .first: row 1 of .*a.parquet.; give the table a column of text named one of"
    with pytest.raises(ValueError, match=says):
        read_images(str(tmp_path), SIZE)
    write(tmp_path / "a.parquet", [{"image": png(i)} for i in range(3)])
    with pytest.raises(ValueError, match="3 of the 3 images"):
        read_images(str(tmp_path), SIZE)
    assert read_images(str(tmp_path), SIZE, captioned=False).captions == ("", "", "")


def test_the_column_of_images_is_the_only_one_or_the_one_called_so(tmp_path, write):
    file = tmp_path / "a.parquet"
    write(file, [{"mask": b"no", "image": png(0), "text": "x"}])
    assert len(read_images(str(file), SIZE)) == 1
    write(file, [{"mask": b"no", "picture": png(0), "text": "x"}])
    with pytest.raises(
        ValueError, match="a.parquet has several columns of encoded images .*'mask': binary.*; name the one to learn"
    ):
        read_images(str(file), SIZE)
    write(file, [{"url": "x.png", "text": "x"}])
    with pytest.raises(ValueError, match="a.parquet has no column of encoded images .it has 'url': string, 'text': string"):
        read_images(str(file), SIZE)


def test_splits_are_not_mixed(tmp_path, write):
    for split in ("test", "train"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", [row(0)])
    with pytest.raises(ValueError, match=r"holds the splits test, train; name one, as in .*/train-\*.parquet"):
        read_images(str(tmp_path), SIZE)
    assert len(read_images(str(tmp_path / "train-*.parquet"), SIZE)) == 1


def test_a_file_that_is_no_parquet_is_named(tmp_path, write):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="a.parquet is no whole parquet file .*; copy it again"):
        read_images(str(tmp_path), SIZE)


def test_a_group_is_read_once_for_rows_in_order(tmp_path, write, monkeypatch):
    from fewstep.data import tables

    write(tmp_path / "a.parquet", [row(i) for i in range(6)], group=3)
    found = tables.read_tables([tmp_path / "a.parquet"])
    groups, plain = [], tables._rows
    monkeypatch.setattr(tables, "_rows", lambda *of: groups.append(of[2]) or plain(*of))
    assert [cell.read_bytes() for cell, _ in found] == [png(i) for i in range(6)]
    assert groups == [0, 1]


def test_without_pyarrow_the_remedy_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow to be read; install it .pip install 'fewstep\[data\]'"):
        read_images(str(tmp_path), SIZE)
