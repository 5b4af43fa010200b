"""Tables as spreadsheets write them: separators, encodings, empty cells and rows, Excel files."""

import csv
import io
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.common.display import pip_install
from fleetune.data import read, readers
from fleetune.data.readers import FileRow
from fleetune.errors import DataError

HEAD = ["Ticket-Nr.", "Kundenfrage (Text)", "Antwort, Support", "Abteilung"]
ROWS = [[f"T-{i}", f"Wie groß ist {i}, „so“?", f"{i} – und 3 €; mehr nicht", "Verkauf"] for i in range(60)]
for at in (12, 40, 57):
    ROWS[at] = [*ROWS[at][:2], "", "Verkauf"]


def written(mark: str, rows: list[list[str]] = ROWS) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=mark).writerows([HEAD, *rows])
    return text.getvalue()


ENCODINGS = {"utf-8": [], "utf-8-sig": [], "utf-16": [], "cp1252": ["is read as cp1252 (Windows)"]}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mark", [";", ",", "\t", "|"])
def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path, mark: str, encoding: str) -> None:
    file, told = tmp_path / ("faq.tsv" if mark == "\t" else "faq.csv"), list[str]()
    file.write_bytes((written(mark) + f"{mark * 3}\r\n" * 20).encode(encoding))
    found = read(str(file), note=told.append)
    assert len(found) == 57
    assert found[3].messages[0][1] == "Wie groß ist 3, „so“?"
    assert found[3].response == "3 – und 3 €; mehr nicht"
    assert dict(found[3].meta) == {"Ticket-Nr.": "T-3", "Abteilung": "Verkauf"}
    *first, assumed, left_out = told
    assert [text.partition("it ")[2] for text in first] == ENCODINGS[encoding]
    assert assumed == "columns assumed: --columns 'prompt=Kundenfrage (Text),response=Antwort\\, Support'"
    places = ", ".join(f"{file}:{line}" for line in (14, 42, 59))
    assert left_out == f"3 of 60 rows are left out: column 'Antwort, Support' is empty ({places})"


def test_too_many_bad_rows_are_refused_and_any_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    few = [row if row[2] or i == 12 else [*row[:2], "da", ""] for i, row in enumerate(ROWS)]
    file.write_text(written(";", few))
    assert len(read(str(file))) == 59
    with pytest.raises(DataError, match=r"^1 of 60 rows of .* cannot be used:\n.*csv:14: column"):
        read(str(file), strict=True)
    file.write_text(written(";", few[10:20]))
    assert len(read(str(file))) == 9, "a tenth"
    file.write_text(written(";", few[10:19]))
    with pytest.raises(DataError, match=r"^1 of 9 rows"):
        read(str(file))


CELL = st.text(st.sampled_from('ab ;,|\t"\n'), max_size=8).filter(lambda cell: cell.strip('"\n\t ;,|'))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=2, max_size=9)
    )
)
def test_quoted_tables_read_back_under_any_separator(tmp_path_factory, rows):
    names = [f"c{i}" for i in range(len(rows[0]))]
    for mark in readers.SEPARATORS:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=mark, quoting=csv.QUOTE_ALL).writerows([names, *rows])
        file = tmp_path_factory.getbasetemp() / "quoted.csv"
        file.write_bytes(text.getvalue().encode())
        found = list(readers.delimited(file, "f", lambda _: None))
        assert [row.fields for row in found if isinstance(row, FileRow)] == [
            dict(zip(names, row, strict=True)) for row in rows
        ]


def test_a_header_alone_does_not_choose_the_separator() -> None:
    assert readers.separator("a, b;c\n1;2\n3;4\n") == ";"
    assert readers.separator("a;b, c\n1,2\n3,4\n") == ","
    assert readers.separator("a, b, c;d\n1;2\n3;4\n") == ";"
    assert readers.separator("sentence\none; two\nthree, four, five\nsix\n") in "\t|", "one column"
    assert readers.separator("sentence\none, two\nthree, four\n") in "\t|;", "one column"
    assert readers.separator("text,\na, b\nc,d\ne,f\n") == ",", "the second has no name"
    assert readers.separator("") == ","


NAMES = ["Frage", "Antwort", "Datum", "Bearbeiter (intern)"]
ANSWERED = [[f"Wann, am {i}.?", f"Um {i}; wie immer, gern", "", "Jo"] for i in range(4)]
TITLED = {  # what stands above the header, the row of the title, the row of the header
    "no title": ([], 0, 1),
    "a title": ([["Radhaus Müller, Stand März; neu"]], 1, 2),
    "a blank row below": ([["Radhaus Müller"], []], 1, 3),
    "a blank row above": ([[], ["Radhaus Müller"], []], 2, 4),
    "two rows": ([["Radhaus"], ["Stand", "März"], [], []], 1, 5),
    "facts and a blank row": ([["Radhaus", "März"], []], 1, 3),
}


@pytest.mark.parametrize("mark", [";", ",", "\t", "|", ".xlsx"])
@pytest.mark.parametrize("name", TITLED)
def test_a_title_above_the_header_is_skipped(tmp_path: Path, name: str, mark: str) -> None:
    above, title, header = TITLED[name]
    table: list[list[object]] = [[*row, "", "", "", ""][:4] for row in (*above, NAMES, *ANSWERED)]
    file, told = tmp_path / ("faq.xlsx" if mark == ".xlsx" else "faq.csv"), list[str]()
    if mark == ".xlsx":
        workbook(file, FAQ=[[cell or None for cell in row] for row in table])
    else:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=mark).writerows(table)
        file.write_text(text.getvalue(), encoding="utf-8")
    found = read(str(file), note=told.append)
    assert [example.response for example in found] == [row[1] for row in ANSWERED]
    assert found[0].where == f"{file}:{'row ' if mark == '.xlsx' else ''}{header + 1}"
    *first, assumed = told
    assert first == [f"row {title} of {file} is a title: the header is row {header}"] * bool(title)
    assert assumed == "columns assumed: --columns prompt=Frage,response=Antwort"
    with pytest.raises(DataError, match=r"no column 'Frege' .*there are: Frage, Antwort, Datum") as no:
        read(str(file), columns="prompt=Frege")
    assert no.value.hint == "did you mean 'Frage'?"


@pytest.mark.parametrize("above", ["Radhaus 2026\n", "Radhaus, März\n\n", "Radhaus\nStand März\n"])
@pytest.mark.parametrize("names", ["Frage;Antwort", "Frage;2026", "2025;2026", "1;2"])
def test_a_title_may_lack_separators_and_a_column_be_named_by_a_year(tmp_path: Path, above: str, names: str):
    file = tmp_path / "faq.csv"
    lines = [names, *(f"Wann, am {i}.?;Um {i}, wie immer" for i in range(4))]
    for title in (above, above.replace("\n", ";\n")):
        file.write_text(title + "\n".join(lines))
        found = read(str(file), note=lambda _: None)
        assert [example.response for example in found] == [f"Um {i}, wie immer" for i in range(4)]


@pytest.mark.parametrize("above", [[], ["Radhaus;;", "", ""]])
def test_names_may_stand_in_two_rows_or_twice(tmp_path: Path, above: list[str]) -> None:
    file, told = tmp_path / "faq.csv", list[str]()
    header = [*above, "Nr;Kunde;;Antwort;Notiz", ";Ort;Frage;;Notiz"]
    file.write_text("\n".join([*header, *(f"{i};Ulm;Wann am {i}.?;Um {i}, wie immer;" for i in range(4))]))
    (found, *_) = read(str(file), note=told.append)
    assert (found.messages[-1][1], found.response) == ("Wann am 0.?", "Um 0, wie immer")
    assert dict(found.meta) == {"Nr": "0", "Ort": "Ulm", "Notiz": ""}
    assert told[0] == f"the header of {file} is rows {len(header) - 1} and {len(header)}"
    file.write_text("Frage;Antwort;Notiz;Notiz\n" + "Wann am 1.?;Um 6, wie immer;x;y\n" * 4)
    assert dict(read(str(file), note=told.append)[0].meta) == {"Notiz": "x", "Notiz (column 4)": "y"}
    assert f"a column of {file} has the name of another, and is called 'Notiz (column 4)'" in told


UNTITLED = {
    "one column": ["Spruch", "Guten Tag", "Auf bald"],
    "one column, two cells once": ["Spruch;", "Guten Tag;", "Ach;so", "Auf bald;", "Bis dann;"],
    "a counter without a name": [";Spruch", "0;Guten Tag", "1;Auf bald"],
    "an index without a name": [";Spruch", "a;Guten Tag", "b;Auf bald"],
    "texts with years": ["Spruch;", "Guten Tag;2024", "Auf bald;2025"],
    "texts with remarks": ["text;", "Guten Tag;neu", "Auf bald;neu"],
    "texts with remarks, in capitals": ["Text;", "Guten Tag;neu", "Auf bald;neu"],
    "texts with numbers": ["Spruch;", "Guten Tag;1", "Auf bald;2"],
    "columns without names": ["Frage;Antwort;;", "Wann?;Um 6;x;y", "Wo?;Hier;x;y"],
    "blank rows everywhere": ["Frage;Antwort;", "", "Wann?;Um 6;x", "", "Wo?;Hier;y"],
    "years before a blank row": ["2023;2024", "", "Guten Tag;Auf bald", "Ach;so"],
    "no names in a second row": ["Frage;;Antwort", ";x;Um 6", "Wo?;y;Hier", ";z;Hier", ";z;Um 7"],
    "a header alone": ["Spruch;", "Frage;Antwort"],
}


@pytest.mark.parametrize("name", UNTITLED)
def test_a_header_with_few_names_is_no_title(name: str) -> None:
    assert readers.header_at(list(csv.reader(UNTITLED[name], delimiter=";"))) == 0


def test_lines_of_excel_and_cells_that_it_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("sep=;\nquestion;answer;note;;\n\nq;a\nq;a;n\n;;\n")
    first, second = read(str(file))
    assert (first.where, second.where) == (f"{file}:4", f"{file}:5")
    assert (dict(first.meta), dict(second.meta)) == ({"note": ""}, {"note": "n"})


def workbook(path: Path, **sheets: list[list[object]]) -> str:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return str(path)


def test_an_excel_file_is_read_as_its_csv(tmp_path: Path) -> None:
    table: list[list[object]] = [[], HEAD, *([cell or None for cell in row] for row in ROWS)]
    source = workbook(
        tmp_path / "faq.xlsx", Zahlen=[["Radhaus"], *[[123456789]] * 49], FAQ=table, Alt=[["x"]]
    )
    (tmp_path / "faq.csv").write_text(written(","))
    told: list[str] = []
    found = read(source, note=told.append)
    assert found == read(str(tmp_path / "faq.csv"))
    assert found[0].where == f"{source}:row 3"
    assert told[0] == f"the sheet 'FAQ' of {source} is read, not 'Zahlen', 'Alt'"
    assert "3 of 60 rows are left out" in told[2]


def test_of_an_excel_file_one_sheet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(readers, "_cell", lambda value: seen.append(value) or str(value or ""))
    read(workbook(tmp_path / "a.xlsx", Empty=[[]], S=[["question", "answer"], ["q", "a"]], Z=[["z"]] * 99))
    assert seen.count("z") == readers.LINES + 1  # of the sheet that is not read


def test_cells_of_excel_become_texts(tmp_path: Path) -> None:
    row = ["wie viel", 12.0, 2.5, True, date(2026, 11, 30), None]
    source = workbook(tmp_path / "a.xlsx", S=[["question", "answer", "b", "c", "d", "e"], row])
    (example,) = read(source)
    assert example.response == "12"
    assert dict(example.meta) == {"b": "2.5", "c": "true", "d": "2026-11-30 00:00:00", "e": ""}


def test_excel_needs_openpyxl_and_an_excel_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.xlsx"
    for raw, what, hint in (
        (b"\xd0\xcf\x11\xe0 old or with a password", "no Excel file", "without a password"),
        (b"PK\x03\x04", "no Excel file", "save it again"),
        (b"", "the file is empty", "save it again as .xlsx"),
        ("Frage;Größe\r\n".encode("cp1252"), "it is text, not Excel", "rename it to .csv"),
    ):
        path.write_bytes(raw)
        pytest.importorskip("openpyxl")
        with pytest.raises(DataError, match=rf"a\.xlsx: cannot be read: {what}") as no:
            read(str(path))
        assert hint in str(no.value.hint)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match="need openpyxl") as no:
        read(str(path))
    assert no.value.hint == pip_install("xlsx")
