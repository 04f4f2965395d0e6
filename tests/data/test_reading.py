from __future__ import annotations

import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.config import DataConfig, TableSource
from medtrain.data.formats import BrokenRow, Row, read_file
from medtrain.data.json_document import DocumentError, document_values
from medtrain.data.reading import files_of, is_local, read_source, resolve
from medtrain.errors import DataError, EndpointError, MedtrainError

ROWS = [{"question": f"What is {i}?", "answer": f"Thing {i}: “ü”"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def source(path: str | list[str], **fields: Any) -> TableSource:
    return TableSource.model_validate({"adapter": "table", "path": path, **fields})


def rows_of(path: str | list[str], **fields: Any) -> list[Row]:
    one = source(path, **fields)
    return [row.content for row in read_source(one, resolve(one))]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


CSV = "question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", "\ufeff" + LINES + "\n\n"),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({str(i): row for i, row in enumerate(ROWS)})),
        ("a.json", json.dumps({"data": ROWS}, indent=1)),
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV.replace(",", ";").replace("\n", "\r\n")),
        ("a.TSV", CSV.replace(",", "\t")),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, content: str, packed: str
) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
    }
    file = written(tmp_path / (name + packed), pack[packed](content.encode()))
    assert list(read_file(file)) == ROWS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path: Path, packed: str) -> None:
    data = parquet_bytes(ROWS)
    file = written(tmp_path / f"a.parquet{packed}", gzip.compress(data) if packed else data)
    assert list(read_file(file)) == ROWS


def test_a_parquet_text_that_is_not_utf8_is_one_broken_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"fine", b"\xff\xfe", b"fine too"]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"question": broken}), tmp_path / "a.parquet")
    found = list(read_file(tmp_path / "a.parquet"))
    assert [isinstance(row, BrokenRow) for row in found] == [False, True, False]


def test_malformed_lines_are_rows_with_a_reason(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    lines = [good, '{"cut": "off', "[1, 2]", "null", "not json", "[" * 100_000, good]
    content = "\n".join(lines).encode() + b'\n{"question": "caf\xe9"}\n' + b"\x00\n"
    found = list(read_file(written(tmp_path / "a.jsonl", content)))
    assert found[0] == found[6] == ROWS[0]
    reasons = [row.reason for row in found if isinstance(row, BrokenRow)]
    assert reasons == [
        "malformed", "wrong-type", "wrong-type", "malformed", "malformed", "broken-text",
        "malformed",
    ]  # fmt: skip


def test_an_endless_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtrain.data.formats.LONGEST_ROW", 1_000)
    content = LINES + '{"question": "' + "x" * 5_000 + '"}\n' + LINES
    found = list(read_file(written(tmp_path / "a.jsonl", content)))
    assert [isinstance(row, BrokenRow) for row in found] == [False] * 3 + [True] + [False] * 3


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    content = 'question,answer\na,b\nonly one\n\n"two\nlines",c\n1,2,3\n'
    found = list(read_file(written(tmp_path / "a.csv", content)))
    assert found[0] == {"question": "a", "answer": "b"}
    assert found[2] == {"question": "two\nlines", "answer": "c"}
    assert [row.reason for row in found if isinstance(row, BrokenRow)] == ["malformed"] * 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", LINES, "what kind of file"),
        ("a", LINES, "what kind of file"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "packed with gzip"),
        ("a.jsonl.gz", LINES, "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-20], "cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(LINES.encode() * 99)[:-20], "cannot be unpacked"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00 then noise", "cannot be unpacked"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        ("a.json", "<!DOCTYPE html><html>", "a web page"),
        ("a.json", '[{"question": "a"}, {"quest', "not valid JSON"),
        ("a.json", '{"a": {"question": "b"} "c"}', "not valid JSON"),
        ("a.json", "42", "not valid JSON"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("a.csv", b"PK\x03\x04...", "spreadsheet"),
        ("a.csv", "a,b,a\n1,2,3\n", "more than one column named a"),
        ("a.parquet", LINES, "not a Parquet file"),
        ("a.parquet", b"PAR1 and then nothing", "damaged Parquet"),
    ],
)
def test_a_file_of_another_format_is_one_clear_error(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        list(read_file(written(tmp_path / name, content)))
    assert name in caught.value.message
    assert caught.value.fix


members = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(members) | st.dictionaries(st.text(), members), st.sampled_from([None, 1]))
def test_a_document_is_read_member_by_member(document: Any, indent: int | None) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=True).encode()
    expected = list(document.items()) if isinstance(document, dict) else list(enumerate(document))
    assert list(document_values(io.BytesIO(text))) == expected


@given(st.lists(members, min_size=1), st.data())
def test_a_cut_document_is_an_error(document: Any, data: st.DataObject) -> None:
    text = json.dumps(document).encode()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(DocumentError):
        list(document_values(io.BytesIO(text[:cut])))


def test_a_document_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtrain.data.json_document._PIECE", 7)
    file = written(tmp_path / "a.json", json.dumps({"123": ROWS[0], "45": {"n": 1234567890}}))
    assert list(read_file(file)) == [ROWS[0], {"n": 1234567890}]


# Where the rows come from


def test_globs_lists_and_numbering(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        written(tmp_path / name, json.dumps({"question": name}) + "\n")
    one = source([f"{tmp_path}/*.jsonl", f"{tmp_path}/**/c.jsonl", f"{tmp_path}/a.jsonl"])
    found = [(row.number, row.content) for row in read_source(one, resolve(one))]
    names = ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert found == [(i, {"question": name}) for i, name in enumerate(names)]


def test_what_is_local_and_what_is_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lavita").mkdir()
    written(tmp_path / "data" / "medquad", "")
    for path in ("x/y.jsonl", "./x", "/x/y", "~/x", "x/*", "a/b/c", "x.csv.gz", "data/medquad"):
        assert is_local(path), path
    for path in ("lavita/MedQuAD", "squad", "qiaojin/PubMedQA", "a/b.c"):
        assert not is_local(path), path


@pytest.mark.parametrize("path", ["missing.jsonl", "no/such/*.jsonl", "", [], "builtin:nothing"])
def test_a_missing_file_is_one_clear_error(path: str | list[str]) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert caught.value.fix


def test_files_of_a_source_come_once_and_need_nothing_heavy(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.jsonl", LINES), written(tmp_path / "b.jsonl", LINES)
    paths = [str(b), f"{tmp_path}/*.jsonl", "lavita/MedQuAD", "missing.jsonl"]
    config = DataConfig.model_validate({"sources": [{"adapter": "table", "path": paths}]})
    assert files_of(config.sources[0]) == [b, a]
    check = (
        "import sys, medtrain.data.reading; "
        "print({'torch', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules) or 'light')"
    )
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "light"


def test_the_built_in_questions() -> None:
    try:
        found = rows_of("builtin:questions")
    except DataError:
        pytest.skip("the sample set is not part of this checkout")
    assert len(found) >= 150
    assert all(isinstance(row, dict) and row["question"] and row["answer"] for row in found)


# Datasets


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_a_directory_laid_out_like_a_hub_dataset(tmp_path: Path) -> None:
    written(tmp_path / "set" / "data" / "train-00000.parquet", parquet_bytes(ROWS[:2]))
    written(tmp_path / "set" / "data" / "test-00000.parquet", parquet_bytes(ROWS[2:]))
    assert rows_of(str(tmp_path / "set")) == ROWS[:2]
    assert rows_of(str(tmp_path / "set"), split="test") == ROWS[2:]
    with pytest.raises(DataError, match="validation"):
        rows_of(str(tmp_path / "set"), split="validation")
    with pytest.raises(DataError, match="labeled"):
        rows_of(str(tmp_path / "set"), subset="labeled")


@pytest.mark.usefixtures("own_cache")
def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "many")
    assert rows_of(str(tmp_path / "one")) == ROWS
    assert rows_of(str(tmp_path / "many")) == ROWS
    with pytest.raises(DataError, match="cannot be loaded"):
        rows_of(str(tmp_path / "many"), split="test")


@pytest.mark.usefixtures("own_cache")
def test_a_directory_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        rows_of(str(tmp_path / "empty"))


def test_offline_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(EndpointError, match="hub cannot be reached") as caught:
        rows_of("nobody-here/no-such-dataset")
    assert caught.value.exit_code == 69
    assert caught.value.fix


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (ConnectionError("Couldn't reach it"), EndpointError, "cannot be reached"),
        (FileNotFoundError("no data files"), DataError, "cannot be loaded"),
        (ValueError("Unknown split 'dev'"), DataError, "Unknown split"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            DataError,
            "script",
        ),
    ],
)
def test_failures_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[MedtrainError], says: str
) -> None:
    import datasets

    def load_dataset(*args: Any, **fields: Any) -> None:
        assert "trust_remote_code" not in fields
        assert fields["revision"] == "abc"
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=says) as caught:
        rows_of("someone/something", revision="abc")
    assert caught.value.fix


def test_a_gated_or_missing_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*args: Any, **fields: Any) -> None:
        raise DatasetNotFoundError("Dataset doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="neither a file here nor a dataset") as caught:
        rows_of("someone/something")
    assert "HF_TOKEN" in caught.value.fix
