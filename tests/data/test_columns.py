"""Columns: as they are mapped, in any spelling of the mapping, else found by their names and by their texts."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import write_rows as write

from fleetune.data import Example, columns, read
from fleetune.data.forms import FIELDS
from fleetune.errors import DataError

Row = dict[str, Any]
ASKED = "When do you open on Monday?"
SAID = "At half past six, as always, dear guest."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]


def named(*names: str, **others: Any) -> Row:
    return dict(zip(names, (ASKED, SAID), strict=False)) | others


# the columns of a row, and those that are read as prompt and response
PAIRS: dict[str, tuple[Row, str]] = {
    "another case": (named("Question", "Answer"), "question=Question,answer=Answer"),
    "Dolly in another case": (
        named("Instruction", "Response", Context=" "),
        "instruction=Instruction,context=Context,response=Response",
    ),
    "Alpaca in another case": (named("INSTRUCTION", "Output"), "instruction=INSTRUCTION,output=Output"),
    "labelled": ({"Text": ASKED, "Label": "good"}, "text=Text,label=Label"),
    "query": (named("query", "response"), "prompt=query,response=response"),
    "input": (named("input", "output"), "prompt=input,response=output"),
    "one word each": ({"input": "2+2", "output": "4", "note": ASKED}, "prompt=input,response=output"),
    "user": (named("user", "assistant"), "prompt=user,response=assistant"),
    "letters": (named("Q", "A"), "prompt=Q,response=A"),
    "instruction and answer": (named("instruction", "answer"), "prompt=instruction,response=answer"),
    "German": (named("Frage", "Antwort", Nr="7"), "prompt=Frage,response=Antwort"),
    "Spanish": (named("PREGUNTA", "Respuesta"), "prompt=PREGUNTA,response=Respuesta"),
    "French": (named("Question", "Réponse"), "prompt=Question,response=Réponse"),
    "French without an accent": (named("question", "reponse"), "prompt=question,response=reponse"),
    "Italian": (named("domanda", "risposta"), "prompt=domanda,response=risposta"),
    "Chinese": ({"问题": "你们什么时候开门？", "回答": "早上六点半。"}, "prompt=问题,response=回答"),
    "the answer first": ({"Antwort": SAID, "Frage": ASKED}, "prompt=Frage,response=Antwort"),
    "inside a name": (
        {"Ticket-Nr.": "T-1", "Kundenfrage (Text)": ASKED, "Antwort, Support": SAID, "Abteilung": "Versand"},
        "prompt=Kundenfrage (Text),response=Antwort\\, Support",
    ),
    "an id with the name": (
        {"Frage-Id": "F 17 x", "Kundenfrage": ASKED, "Antwort": SAID},
        "prompt=Kundenfrage,response=Antwort",
    ),
    "by length": (
        {"id": "a1b2c3d4" * 5, "on": "2026-11-30 12:00", "x": ASKED, "who": "Ann Lee", "y": SAID},
        "prompt=x,response=y",
    ),
    "by one name": ({"Titel": ASKED * 9, "Kunde": ASKED, "Antwort": SAID}, "prompt=Kunde,response=Antwort"),
    "a column without a name": ({"x": ASKED, "": SAID, " ": SAID, "y": SAID}, "prompt=x,response=y"),
    "a talk": ({"talk": TURNS, "n": 3}, "messages=talk"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_columns_are_assumed_by_their_names_or_texts(tmp_path: Path, name: str) -> None:
    row, wanted = PAIRS[name]
    told: list[str] = []
    rows = [{key: f"{v} {i}" if v in (ASKED, SAID) else v for key, v in row.items()} for i in range(4)]
    found = read(write(tmp_path / "a.jsonl", *rows), note=told.append)
    (assumed,) = told
    assert columns.parse(assumed.partition("--columns ")[2].strip("'")) == columns.parse(wanted)
    told.clear()
    assert read(str(tmp_path / "a.jsonl"), columns=wanted, note=told.append) == found
    assert told == [], "what is stated is not told"


UNKNOWN: dict[str, tuple[Row, str]] = {
    "numbers": ({"q": 1, "a": 2}, "--columns prompt=question,response=answer"),
    "one text": ({"id": "x1", "speech": SAID}, "to train on texts alone: --columns text=speech"),
    "no label": ({"sentence1": ASKED, "sentence2": SAID}, "give each row a label"),
    "context is no answer": ({"instruction": ASKED, "context": SAID, "category": "a b"}, "--columns prompt="),
    "the answer has no name": ({"Frage": ASKED, "": SAID}, "text=Frage"),
    "the same in each row": ({"speech": SAID, "motto": "We bake with love."}, "text=speech"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_assumed_is_asked_for(tmp_path: Path, name: str) -> None:
    row, hint = UNKNOWN[name]
    rows = [{key: f"{v} {i}" if v in (ASKED, SAID) else v for key, v in row.items()} for i in range(4)]
    with pytest.raises(DataError, match=r"a\.jsonl has the columns of no form.* \(there are: ") as no:
        read(write(tmp_path / "a.jsonl", *rows))
    assert ("none holds sentences" in no.value.message) == (name == "numbers")
    assert hint in str(no.value.hint)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("prompt=frage,response=ANTWORT", {"prompt": "Frage", "response": "Antwort"}),
        ("client=filiale", {"client": "Filiale", "prompt": "Frage", "response": "Antwort"}),
        ("response=Abteilung", {"response": "Abteilung", "prompt": "Frage"}),
        ("Frage=prompt,Antwort=response", {"prompt": "Frage", "response": "Antwort"}),
        ("prompt=frage", {"prompt": "Frage", "response": "Antwort"}),
    ],
)
def test_what_a_mapping_lacks_is_assumed(given: str, wanted: dict[str, str]) -> None:
    row = {"Frage": ASKED, "Antwort": SAID, "Filiale": "Oslo", "Abteilung": "Versand"}
    rows = [{**row, "Frage": f"{ASKED} {i}", "Antwort": f"{SAID} {i}"} for i in range(3)]
    assert columns.settled(columns.parse(given), rows, "a.csv")[0] == wanted


def test_a_column_that_is_mapped_is_not_assumed_to_be_another() -> None:
    row = {"Prompt": "old", "Completion": SAID, "mine": ASKED}
    found, told = columns.settled({"prompt": "mine"}, [row], "a.csv")
    assert found == {"prompt": "mine", "completion": "Completion"}
    assert told == "columns assumed: --columns prompt=mine,completion=Completion"


@pytest.mark.parametrize("spec", ["prompt=a b, c,response=d", "prompt=a b\\, c,response=d"])
def test_a_column_may_have_a_comma(spec: str) -> None:
    assert columns.parse(spec) == {"prompt": "a b, c", "response": "d"}


LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\")
NAMES = st.text(LETTERS, min_size=1).map(str.strip)


@given(st.dictionaries(st.sampled_from(FIELDS), NAMES.filter(lambda n: n and n not in FIELDS), max_size=4))
def test_a_mapping_is_written_as_it_is_read(mapped: dict[str, str]) -> None:
    if len(set(mapped.values())) == len(mapped):
        assert columns.parse(columns.spec_of(mapped)) == mapped


def test_a_row_before_those_with_a_form_is_a_bad_one(tmp_path: Path) -> None:
    told: list[str] = []
    rows = [{"instruction": "q", "context": ""}, *[{"instruction": "q", "response": "a"}] * 10]
    found = read(write(tmp_path / "a.jsonl", *rows), note=told.append)
    assert found == [Example((("user", "q"),), "a")] * 10
    (said,) = told
    assert said.startswith("1 of 11 rows is left out: field 'response' is missing")


def test_a_mapping_may_be_a_dict(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"Frage": ASKED, "Antwort, lang": SAID})
    found = read(file, columns={"prompt": "Frage", "response": "Antwort, lang"})
    assert found == [Example((("user", ASKED),), SAID)]
