"""Webdataset shards and parquet files give the images and captions that a folder of them gives; bad ones are told by name."""

import io
import re
import sys
import warnings

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fewstep.data import read_images

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(file, rows, group=2):
    """One parquet file of rows (dicts of one shape), `group` rows a row group."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)


def png(i):
    raw = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(raw, "png")
    return raw.getvalue()


def row(i, raw=None):
    """As datasets' Image feature is stored."""
    return {"id": i, "image": {"bytes": raw or png(i), "path": f"{i}.png"}, "text": f"caption {i}"}


def test_tables_and_a_folder_of_the_same_images_are_one_set(tmp_path):
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


def test_a_column_of_bytes_is_one_of_images(tmp_path):
    write(tmp_path / "a.parquet", [{"picture": png(i), "caption": f" caption\n{i}"} for i in range(3)])
    found = read_images(str(tmp_path / "a.parquet"), SIZE)
    assert found.captions == ("caption 0", "caption 1", "caption 2")
    assert [str(f) for f in found.files] == [f"row {i} of {tmp_path}/a.parquet" for i in range(3)]


def test_damaged_and_missing_images_in_tables_are_left_out_counted_and_named(tmp_path):
    rows = [row(0), row(1, png(1)[:-60]), row(2), row(3)]
    rows[2]["image"]["bytes"] = None
    write(tmp_path / "a.parquet", rows)
    says = "2 of the 4 images in .* cannot be read and are left out .first: row 1 of .*, row 2 of .*a.parquet"
    with pytest.warns(UserWarning, match=says):
        found = read_images(str(tmp_path), SIZE)
    assert found.captions == ("caption 0", "caption 3")
    assert found.load([1], SIZE).shape == (1, 8, 8, 3)


def test_rows_without_a_caption_are_counted_and_the_first_named(tmp_path):
    write(tmp_path / "a.parquet", [row(0), row(1) | {"text": None}, row(2) | {"text": " "}])
    says = "2 of the 3 images in .* have no caption .first: row 1 of .*a.parquet.; give the table a column of text named one of"
    with pytest.raises(ValueError, match=says):
        read_images(str(tmp_path), SIZE)
    write(tmp_path / "a.parquet", [{"image": png(i)} for i in range(3)])
    with pytest.raises(ValueError, match="3 of the 3 images"):
        read_images(str(tmp_path), SIZE)
    assert read_images(str(tmp_path), SIZE, captioned=False).captions == ("", "", "")


def test_the_column_of_images_is_the_only_one_or_the_one_called_so(tmp_path):
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


@pytest.mark.parametrize(
    ("files", "splits", "one"),
    [
        (("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"), "test, train", "train-*.parquet"),
        (
            ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"),
            "test, train",
            "data/train-*.parquet",
        ),
        (("train/data-00000-of-00002", "train/data-00001-of-00002", "test/data-00000-of-00001"), "test, train", "train"),
        (("default/train/0000", "default/train/0001", "default/validation/0000"), "train, validation", "default/train"),
        (("train", "test"), "test, train", "train.parquet"),
        (("en-00000-of-00001", "fr-00000-of-00001"), "en, fr", "en-*.parquet"),
    ],
)
def test_splits_as_datasets_lays_them_out_are_not_mixed(tmp_path, files, splits, one):
    for i, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.parquet", [row(2 * i), row(2 * i + 1)])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds the splits {splits}; name one, as in {tmp_path / one}")):
        read_images(str(tmp_path), SIZE)
    found = read_images(str(tmp_path / one), SIZE)
    taken = [i for i, name in enumerate(files) if name.startswith(one.split("*")[0].removesuffix(".parquet"))]
    assert found.captions == tuple(f"caption {k}" for i in taken for k in (2 * i, 2 * i + 1))


def test_files_of_one_dataset_that_are_no_splits_are_read_together_in_order(tmp_path):
    for i, name in enumerate(("data-00000-of-00003", "data-00001-of-00003", "data-00002-of-00003")):
        write(tmp_path / f"{name}.parquet", [row(i)])
    assert read_images(str(tmp_path), SIZE).captions == ("caption 0", "caption 1", "caption 2")
    assert len(read_images(str(tmp_path / "data-0000[02]-*.parquet"), SIZE)) == 2
    (tmp_path / "more").mkdir()
    for i in (3, 4):
        write(tmp_path / f"more/part{i}.parquet", [row(i)])
    assert len(read_images(str(tmp_path / "more"), SIZE)) == 2


def test_a_dataset_of_save_to_disk_is_told_how_to_become_parquet(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(
        ValueError, match="holds no images; .*; data-00000-of-00001.arrow is of save_to_disk: write it with datas"
    ):
        read_images(str(tmp_path), SIZE)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="a.parquet is no whole parquet file .*; copy it again"):
        read_images(str(tmp_path), SIZE)


def test_a_group_is_read_once_for_rows_in_order(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow to be read; install it .pip install pyarrow."):
        read_images(str(tmp_path), SIZE)
