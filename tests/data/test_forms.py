"""The forms in which people have their rows, and columns that are renamed into one."""

import json
from pathlib import Path
from typing import Any

import pytest
from tables import write_rows as write

from fleetune.data import Example, read
from fleetune.data.partition import RowsSpec
from fleetune.data.read_rows import is_folder, looks_like_model, looks_like_rows, row_of
from fleetune.errors import DataError, RecipeError

Row = dict[str, Any]


def turns(*said: tuple[str, Any]) -> list[Row]:
    return [{"role": role, "content": content} for role, content in said]


def labelled(text: str, label: str) -> Example:
    return Example((("user", f"{text}\nHow is this text labelled?"),), label, {"label": label}, (text,))


def answered(question: str, answer: str, **meta: str) -> Example:
    return Example((("user", question),), answer, meta)


ASKED = (("user", "q"),)
PLAIN = answered("q", "a")
FORMS: dict[str, tuple[Row, Example]] = {
    "prompt and completion": ({"prompt": "q", "completion": "a"}, PLAIN),
    "prompt and response": (
        {"prompt": "q", "response": "a", "system": "be kind", "context": "c", "n": 1},
        Example((("system", "be kind"), ("user", "q\nc")), "a", {"n": "1"}),
    ),
    "question and answer": ({"question": "q", "answer": "a\n#### 5"}, answered("q", "a\n#### 5")),
    "E2E": ({"mr": "name[X]", "ref": "X it is."}, answered("name[X]", "X it is.")),
    "E2E of the hub": ({"meaning_representation": "q", "human_reference": "a"}, PLAIN),
    "turns of TRL": (
        {"prompt": turns(("system", "s"), ("user", "q")), "completion": turns(("assistant", "a"))},
        Example((("system", "s"), *ASKED), "a"),
    ),
    "text": ({"text": "a tale", "play": "Lear"}, Example((), "a tale", {"play": "Lear"})),
    "text with a label": ({"text": "t", "label": "good"}, labelled("t", "good")),
    "Alpaca with a text": (
        {"instruction": "q", "input": "", "output": "a", "text": "q a"},
        answered("q", "a", text="q a"),
    ),
    "a system": ({"instruction": "q", "response": "a", "system": "s"}, Example(ASKED, "a", {"system": "s"})),
    "text in parts": (
        {"messages": turns(("user", [{"type": "text", "text": "q"}]), ("assistant", "a"))},
        PLAIN,
    ),
    "developer": (
        {"messages": turns(("developer", "s"), ("user", "q"), ("assistant", "a"))},
        Example((("system", "s"), *ASKED), "a"),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_recognised_and_written_back(tmp_path: Path, name: str) -> None:
    row, wanted = FORMS[name]
    assert read(write(tmp_path / "a.jsonl", row)) == [wanted]
    assert read(write(tmp_path / "b.jsonl", row_of(wanted))) == [wanted]


def test_two_forms_in_one_row_are_asked_about(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a", "response": "b"}
    with pytest.raises(DataError, match=r"'response' \(prompt and response\) and field 'completion'") as no:
        read(write(tmp_path / "a.jsonl", row))
    assert "--columns " in str(no.value.hint)
    assert read(str(tmp_path / "a.jsonl"), columns="prompt=prompt,completion=completion")[0].response == "a"


def test_a_row_without_a_label_among_labelled_ones_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'label' is missing"):
        read(write(tmp_path / "a.jsonl", {"text": "t", "label": 1}, {"text": "u"}))
    with pytest.raises(DataError, match=r"jsonl:2: is in labelled text form, but .* is in plain text form"):
        read(write(tmp_path / "a.jsonl", {"text": "u"}, {"text": "t", "label": 1}))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
GAVE = {"role": "tool", "content": "5"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
TWO = turns(("user", "q"), ("assistant", "a"), ("user", "and?"))
ASK = TWO[0]
TOOLS = "1 turns of tools, 1 turns that call tools"
CHATS: dict[str, tuple[list[Row], Example | None, str]] = {
    "a call and its reply": (
        [ASK, CALL, GAVE, *turns(("assistant", "it is 5"))],
        answered("q", "it is 5"),
        TOOLS,
    ),
    "a call with words": (
        [ASK, CALL | {"content": "I look."}, GAVE, *turns(("assistant", "5"))],
        answered("q", "I look.\n5"),
        TOOLS,
    ),
    "a call at the end": ([*TWO, CALL, GAVE], PLAIN, TOOLS),
    "a call for the second question": (
        [*TWO, CALL, GAVE, *turns(("assistant", "b"))],
        Example((*ASKED, ("assistant", "a"), ("user", "and?")), "b"),
        TOOLS,
    ),
    "an image beside the question": (
        turns(("user", [{"type": "text", "text": "q"}, IMAGE]), ("assistant", "a")),
        PLAIN,
        "1 parts that are not text",
    ),
    "an image for a question": (
        turns(("user", [IMAGE]), ("assistant", "a")),
        None,
        "1 parts that are not text, 1 rows without a question and an answer in text",
    ),
    "calls alone": (
        [ASK, CALL, GAVE],
        None,
        "1 rows without a question and an answer in text, 1 turns of tools, 1 turns that call tools",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    messages, wanted, told = CHATS[name]
    plain = {"messages": turns(("user", "x"), ("assistant", "y"))}
    notes: list[str] = []
    found = read(write(tmp_path / "a.jsonl", plain, {"messages": messages}), note=notes.append)
    assert found[1:] == ([wanted] if wanted else [])
    assert notes == [f"left out of the conversations: {told}"]


@pytest.mark.parametrize(
    ("row", "columns", "wanted"),
    [
        ({"q": "Q", "a": "A", "id": 3}, "prompt=q, response=a", answered("Q", "A", id="3")),
        (
            {"q": "Q", "a": "A", "who": "x"},
            "prompt=q,response=a,client=who",
            answered("Q", "A", who="x", client="x"),
        ),
        ({"body": "B", "text": "old"}, "text=body", Example((), "B")),
        ({"body": "B", "stars": 4}, "text=body,label=stars", labelled("B", "4")),
        ({"talk": turns(("user", "q"), ("assistant", "a"))}, "messages=talk", PLAIN),
        ({"talk": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "messages=talk", PLAIN),
        (
            {"instruction": "q", "response": "a", "mine": "m"},
            "prompt=mine",
            answered("m", "a", instruction="q"),
        ),
        (
            {"instruction": "q", "response": "a", "s": "S"},
            "system=s",
            Example((("system", "S"), *ASKED), "a"),
        ),
        ({"question": "q", "answer": "a", "said": "p"}, "context=said", answered("q\np", "a")),
        ({"instruction": "q", "response": "bad", "good": "a"}, "response=good", PLAIN),
        ({"a, b": "q", "answer": "a"}, "prompt=a\\, b,response=answer", PLAIN),
    ],
)
def test_columns_are_read_under_other_names(tmp_path: Path, row: Row, columns: str, wanted: Example) -> None:
    assert read(write(tmp_path / "a.jsonl", row), columns=columns) == [wanted]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("promt=q", r"no form has a field 'promt'\. Did you mean 'prompt'"),
        ("prompt", "'prompt' is not NAME=COLUMN"),
        ("prompt=", "is not NAME=COLUMN"),
        ("prompt=a,prompt=b", "'prompt' is named twice"),
        ("prompt=a,response=a", "column 'a' is named twice"),
    ],
)
def test_a_mapping_that_is_none_is_refused(tmp_path: Path, columns: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as no:
        read(write(tmp_path / "a.jsonl", {"q": "q", "a": "a"}), columns=columns)
    assert "--columns prompt=question,response=answer" in str(no.value.hint)


def test_names_of_a_tables_columns_have_no_space_around_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question , answer\nq,a\n")
    assert read(tmp_path / "a.csv", columns="prompt=question,response=answer") == [PLAIN]


def test_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "response": "a" * (i % 2)} for i in range(20)]
    with pytest.raises(DataError, match=r"^10 of 20 rows of .* cannot be used, the first 5:\n") as no:
        read(write(tmp_path / "a.jsonl", *rows))
    assert no.value.message.count("\n") == 5


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[{"question": "q", "answer": "a"}] * 9)
    both = (
        r"no column 'questoin' to read as prompt, and none 'anwser' to read as response \(there are: question"
    )
    with pytest.raises(DataError, match=both) as no:
        read(file, columns="prompt=questoin,response=anwser")
    assert no.value.hint == "did you mean 'question' and 'answer'?"
    with pytest.raises(DataError, match="no row has a column 'contxt' to read as context"):
        read(file, columns="prompt=question,response=answer,context=contxt")
    with pytest.raises(DataError, match=r"b\.jsonl:1: column 'answer' is empty") as no:
        file_b = write(tmp_path / "b.jsonl", {"question": "q", "answer": ""})
        read(file_b, columns="prompt=question,response=answer")
    assert no.value.hint == "fill in 'answer', or delete these rows"
    with pytest.raises(DataError, match=r"the columns of no form with prompt, label \(there are: question"):
        read(file, columns="prompt=question,label=answer")


def test_a_column_of_the_mapped_name_is_hidden(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"body": "B", "text": "old"}, {"text": "old"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'body' is missing"):
        read(file, columns="text=body")


def test_auto_divides_by_clients_that_the_data_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "t"})
    assert RowsSpec(file).rule == "iid"
    assert RowsSpec(file, "client=role").rule == "column:client"
    assert RowsSpec(file, "client=role", partition="iid").rule == "iid"
    assert RowsSpec(str(tmp_path)).rule == "column:client"


def test_rows_and_models_are_told_apart_by_their_names(tmp_path: Path) -> None:
    devices = tmp_path / "devices"
    devices.mkdir()
    write(devices / "oslo.jsonl", {"q": "q", "a": "x"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = str(tmp_path / "model")
    assert all(looks_like_rows(name) for name in ("demo", "a.jsonl", str(devices)))
    assert not any(looks_like_rows(name) for name in (model, "o/n"))
    assert all(looks_like_model(name) for name in ("a.gguf", model))
    assert not looks_like_model(str(devices))
    assert is_folder(str(devices))
    assert not is_folder("demo")


def test_half_a_character_in_a_column_can_be_written_down(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a", "client": half, half: 1} for half in ("\ud800", "\ud801")]
    found = read(write(tmp_path / "rows.jsonl", *rows))
    assert [example.meta["client"] for example in found] == ["\\ud800", "\\ud801"], "told apart"
    assert json.dumps([dict(example.meta) for example in found], ensure_ascii=False).encode()
