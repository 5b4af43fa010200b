"""Readers: the four forms from the four file types, and an error that names file, line and field."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import DOLLY, jsonl, write

from fleetune.common.display import pip_install
from fleetune.data import Example, read, read_text
from fleetune.data.read_rows import row_of
from fleetune.errors import DataError

SUFFIXES = [".jsonl", ".json", ".csv", ".parquet", ".JSONL"]


@pytest.mark.parametrize("suffix", SUFFIXES[:4])
def test_dolly_and_alpaca_read_the_same_from_every_file_type(tmp_path, suffix):
    rows = [
        {"instruction": "Sum up", "context": 'a, "b"\nc', "response": "été\n", "category": "sum"},
        {"instruction": "Say hi", "context": "", "response": "hi", "category": "qa"},
    ]
    assert read(write(tmp_path / f"dolly{suffix}", rows)) == [
        Example((("user", 'Sum up\na, "b"\nc'),), "été\n", {"category": "sum"}),
        Example((("user", "Say hi"),), "hi", {"category": "qa"}),
    ]
    names = {"context": "input", "response": "output"}
    alpaca = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    asked = 'Sum up\n\n### Input:\na, "b"\nc'
    first = Example((("user", asked),), "été\n", {"category": "sum"})
    assert read(write(tmp_path / f"alpaca{suffix}", alpaca))[0] == first


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations_read_the_same_from_every_file_type(tmp_path, suffix):
    roles = ("system", "user", "assistant", "user", "assistant")
    said = list(zip(roles, ("Kind", "Hi", "Hello", "Bye", "Ciao"), strict=True))
    expected = [Example(tuple(said[:-1]), "Ciao", {"id": "7"})]
    chat = {"messages": [{"role": role, "content": text} for role, text in said], "id": 7}
    assert read(write(tmp_path / f"chat{suffix}", [chat])) == expected
    names = {"user": "human", "assistant": "gpt"}
    share = {"conversations": [{"from": names.get(r, r), "value": text} for r, text in said], "id": 7}
    assert read(write(tmp_path / f"share{suffix}", [share])) == expected


def test_other_single_fields_become_text_and_the_rest_is_left(tmp_path):
    row = {**DOLLY, "client": 3, "ok": True, "score": 0.5, "none": None, "tags": ["a"], "more": {"b": 1}}
    (example,) = read(write(tmp_path / "a.jsonl", [row]))
    assert example.meta == {"category": "open_qa", "client": "3", "ok": "true", "score": "0.5"}


def test_context_may_be_absent_null_or_blank(tmp_path):
    others = ({}, {"context": None}, {"context": " \n"})
    rows = [{"instruction": "q", "response": "a", **extra} for extra in others]
    assert {example.messages for example in read(write(tmp_path / "a.jsonl", rows))} == {(("user", "q"),)}


def test_byte_order_marks_blank_lines_and_line_ends(tmp_path):
    raw = jsonl(DOLLY).strip()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw + b"\r\n\r\n  \n" + raw)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf [\n" + raw + b"\n,\r\n" + raw + b"]\n\n")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfinstruction,response\r\nq,a\r\n\r\nq,a\r\n")
    assert [len(read(str(tmp_path / f"a.{suffix}"))) for suffix in ("jsonl", "json", "csv")] == [2, 2, 2]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(jsonl(DOLLY, DOLLY, DOLLY))
    assert len(read(str(tmp_path / "a.json"))) == 3
    (tmp_path / "a.json").write_bytes(jsonl(DOLLY))
    assert len(read(str(tmp_path / "a.json"))) == 1


def test_rows_under_a_key_of_one_object(tmp_path):
    rows = [DOLLY, DOLLY | {"response": "A tit"}]
    for whole in ({"version": "1.1", "data": rows}, {"rows": rows, "tags": ["a"]}):
        (tmp_path / "a.json").write_text(json.dumps(whole, indent=1))
        assert [e.response for e in read(str(tmp_path / "a.json"))] == ["A wren", "A tit"]
    (tmp_path / "a.json").write_text(json.dumps(CHAT))
    assert [e.response for e in read(str(tmp_path / "a.json"))] == ["a"], "turns are no rows"


TEXTS = {
    "One line.\n  Another.\r\n": [(1, "One line."), (2, "  Another.")],
    "\n\nFirst,\nstill first.\n \n\nSecond.": [(3, "First,\nstill first."), (7, "Second.")],
}


@pytest.mark.parametrize("raw", TEXTS)
def test_a_row_of_plain_text_is_a_paragraph_or_a_line(tmp_path, raw):
    path = tmp_path / "notes.txt"
    path.write_bytes(raw.encode("utf-16"))
    assert read(str(path)) == [Example((), text) for _, text in TEXTS[raw]]
    assert [e.where for e in read(str(path))] == [f"{path}:{line}" for line, _ in TEXTS[raw]]


def test_lines_of_json_in_other_encodings(tmp_path):
    path, row = tmp_path / "a.jsonl", {"prompt": "Grüße “an” – dich", "response": "5 €"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    for encoding, notes in (("utf-16", []), ("utf-8-sig", []), ("cp1252", [1])):
        path.write_bytes((text * 3).encode(encoding))
        told: list[str] = []
        assert read(str(path), note=told.append) == [Example((("user", row["prompt"]),), "5 €")] * 3
        assert told == [f"{path} is not UTF-8: it is read as cp1252 (Windows)" for _ in notes], "once"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_limit_reads_no_further(tmp_path, suffix):
    rows = [{**DOLLY, "n": str(i)} for i in range(6)] + [{**DOLLY, "response": "", "n": "6"}]
    source = write(tmp_path / f"a{suffix}", rows)
    assert [example.meta["n"] for example in read(source, limit=2)] == ["0", "1"]
    assert len(read(source, limit=6)) == 6
    for limit in (7, None):
        with pytest.raises(DataError, match=r"1 of 7 rows of .*\n.*field 'response' is empty"):
            read(source, limit=limit)
    with pytest.raises(DataError, match="at least 1, got 0"):
        read(source, limit=0)


GOOD = jsonl(DOLLY)
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def chat(*turns: tuple[str, object]) -> bytes:
    return jsonl(CHAT, {"messages": [{"role": role, "content": content} for role, content in turns]})


def without(field: str) -> dict:
    return {key: value for key, value in DOLLY.items() if key != field}


# name: file, bytes, place in it, words that are said of it; the errors of rows stand in test_forms.py
BAD: dict[str, tuple[str, bytes, str, str]] = {
    "bad json": ("a.jsonl", GOOD + b'{"instruction": "q", }\n', "2", "not JSON"),
    "cut off": ("a.jsonl", GOOD * 2 + GOOD[:28], "3", "not JSON: Unterminated string at column"),
    "nested": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "2", "nested too deeply"),
    "huge integer": ("a.jsonl", GOOD + b"9" * 5000 + b"\n", "2", "not JSON"),
    "not an object": ("a.jsonl", GOOD + b"[1]\n", "2", "a list, not an object"),
    "no text": ("a.jsonl", GOOD + b'{"instruction": "\x81"}\n', "2", "neither UTF-8 nor cp1252 (byte 0x81)"),
    "no text csv": ("a.csv", b"instruction,response\nq,a\nq,\x81\n", "3", "neither UTF-8 nor cp1252"),
    "list item": ("a.json", b"[\n" + GOOD + b",\n\n{}]", "row 2", "'instruction' is missing"),
    "list broken": ("a.json", b"[\n" + GOOD + b",\n{,}]", "4", "not JSON"),
    "list cut off": ("a.json", b"[\n" + GOOD, "3", "not JSON"),
    "list and more": ("a.json", b"[\n" + GOOD + b"] x", "3", "not JSON"),
    "one object": ("a.json", b'{\n"data": [],\n"v": 1}', "1", "it has: data, v"),
    "short row": ("a.csv", b'instruction,response\n"q\nr",a\nq\n', "4", "'response' is empty"),
    "long row": ("a.csv", b"instruction,response\nq,a\nq,a,b\n", "3", "has 3 values for the header's 2"),
    "quote": ("a.csv", b'instruction,response\nq,a\nq,"a\n', "3", "not CSV"),
    "semicolons": ("a.csv", b"instruction;response\nq;a\nq;a;b\n", "3", "hold semicolons"),
    "missing field": ("a.jsonl", GOOD + jsonl(without("response")), "2", "'response' is missing"),
    "wrong type": ("a.jsonl", jsonl({**DOLLY, "response": 5}), "1", "'response' is 5, not text"),
    "empty": ("a.jsonl", GOOD + jsonl({**DOLLY, "response": " \n"}), "2", "'response' is empty"),
    "half a character": ("a.jsonl", jsonl({**DOLLY, "response": "\ud83d!"}), "1", "half a character"),
    "both answers": ("a.jsonl", jsonl({**DOLLY, "output": "x"}), "1", "keep one of them"),
    "foreign context": ("a.jsonl", jsonl({**without("context"), "input": "x"}), "1", "of the Alpaca form"),
    "mixed forms": ("a.jsonl", GOOD + jsonl(CHAT), "2", "is in chat messages form"),
    "empty list": ("a.jsonl", jsonl({"conversations": []}), "1", "is an empty list"),
    "turn type": ("a.jsonl", jsonl({"messages": ["hi"]}), "1", "'messages[0]' is \"hi\""),
    "role unknown": ("a.jsonl", chat(("narrator", "x")), "2", "the roles are"),
    "late system": ("a.jsonl", chat(("user", "x"), ("system", "y")), "2", "first turn only"),
    "parts": ("a.jsonl", chat(("user", [{"type": "text"}])), "2", "'messages[0].content.text' is missing"),
    "last from user": ("a.jsonl", chat(("user", "x"), ("assistant", "y"), ("user", "z")), "2", "last turn"),
    "answer alone": ("a.jsonl", chat(("assistant", "y")), "2", "before the answer is missing"),
}


@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
def test_the_separator_of_a_table_is_that_of_its_header(tmp_path: Path, mark: str) -> None:
    other = ";" if mark == "," else ","
    path = tmp_path / "a.csv"
    path.write_text(f'instruction{mark}response\n"q{mark} r{other} s"{mark}a{other} b\n\n')
    (row,) = read(str(path))
    assert (row.messages[0][1], row.response) == (f"q{mark} r{other} s", f"a{other} b")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, name):
    file, raw, place, says = BAD[name]
    path = tmp_path / file
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read(str(path))
    assert f"{path}:{place}: " in caught.value.message
    assert says in f"{caught.value.message} {caught.value.hint}"
    assert len(caught.value.message) < 2000


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    source = write(tmp_path / "a.parquet", [DOLLY] * 1500 + [{**DOLLY, "response": None}])
    with pytest.raises(DataError, match=r"a\.parquet:row 1501: field 'response' is null"):
        read(source, strict=True)


def test_the_first_five_bad_rows_come_in_one_error(tmp_path):
    bad = [{**DOLLY, "response": ""}, {**DOLLY, "response": 1}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOLLY, *bad, DOLLY, *bad, *bad, *bad))
    with pytest.raises(DataError) as caught:
        read(str(path))
    _, *lines = caught.value.message.splitlines()
    assert [line.strip().split(": ")[0] for line in lines] == [f"{path}:{i}" for i in (2, 3, 5, 6, 7)]


@pytest.mark.parametrize(
    ("name", "raw"), [("a.jsonl", b"\n \n"), ("a.json", b" [ ] "), ("a.csv", b"a,b\n"), ("a.json", b"")]
)
def test_a_file_without_rows(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name} has no rows"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("tain.jsonl", "no file", "train.jsonl"),
        ("nowhere/a.jsonl", "no folder", "check the path"),
        ("empty", "without a file of rows", "one file per client"),
        ("notes.ods", "no reader for '.ods'", "save it as .xlsx"),
        ("notes.xls", "no reader for '.xls'", "save it as .xlsx"),
        ("notes.doc", "no reader for '.doc'", "save it as one of these"),
        ("a" * 5000 + ".csv", "no file", "data files there"),
        ("", "the splits of one data set", "train.jsonl"),
    ],
)
def test_files_that_are_not_there_or_not_data(tmp_path, name, says, hint):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    for suffix in ("ods", "xls", "doc"):
        (tmp_path / f"notes.{suffix}").write_text("hi")
    (tmp_path / "notes.txt").write_text("no rows beside these")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says) as caught:
        read(str(tmp_path / name))
    assert hint in (caught.value.hint or "")


def test_a_misspelt_file_is_asked_of_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^no file Meier_Karl\.cvs"):
        read("Meier_Karl.cvs")


def test_parquet_needs_pyarrow_and_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR0 not it")
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet"):
        read(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs pyarrow") as caught:
        read(str(path))
    assert caught.value.hint == pip_install("parquet")


TEXT = st.text(min_size=1).filter(str.strip)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"instruction": TEXT, "response": TEXT}), min_size=1, max_size=4))
def test_any_text_survives_jsonl_json_and_parquet(tmp_path, rows):
    expected = [Example((("user", row["instruction"]),), row["response"]) for row in rows]
    for suffix in (".jsonl", ".json", ".parquet"):
        assert read(write(tmp_path / f"a{suffix}", rows)) == expected


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60), at=st.integers(0, len(GOOD)), suffix=st.sampled_from(SUFFIXES[:4]))
def test_no_bytes_raise_anything_but_a_data_error(tmp_path, raw, at, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(GOOD[:at] + raw + GOOD[at:])
    with contextlib.suppress(DataError):
        assert read(str(path))


def test_plain_text(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text("= A =\n\nOne.\n", encoding="utf-8")
    assert read_text(path) == ["= A =\n\nOne.\n"]
    rows = [{"text": "x"}, {"text": " "}, {"text": None}, {"text": "y"}]
    assert read_text(write(tmp_path / "a.jsonl", rows)) == ["x", "y"]
    path.write_bytes(b"one\ntwo \x81\n")
    with pytest.raises(DataError, match=r"wiki\.txt:2: neither UTF-8"):
        read_text(path)
    for raw in (b" \n", jsonl({"text": 5}), GOOD):
        (tmp_path / "b.jsonl").write_bytes(raw)
        with pytest.raises(DataError):
            read_text(tmp_path / "b.jsonl")


SPOKEN = [{"role": role, "content": "s"} for role in ("system", "user", "assistant")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "context": "b", "response": "c", "category": "d"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"messages": SPOKEN, "site": "x"},
        {"question": "q", "sentence": "s", "label": "entailment"},
        {"sentence1": "a", "sentence2": "b", "label": 2, "site": 7},
        {"text": "a", "label": True},
    ],
)
def test_an_example_is_written_as_a_row_that_reads_back_to_it(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = read(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text(json.dumps(row_of(example)) + "\n")
    assert read(str(tmp_path / "b.jsonl")) == [example]
