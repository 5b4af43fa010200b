"""Hostile data files: JSON lines, JSON, CSV and Parquet, damaged in every way, and those that an attack found."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hostile
from fault_report import Injected
from fleetune import data, models
from fleetune.data.encode import encode_rows
from fleetune.models.net.model import Model
from hostile import put, refusal

SAME = {"context": "", "text": "for perplexity"}
ASKED = [(f"what is {i} and {i}?", f"it is {2 * i}, naïve one") for i in range(40)]
ROWS = [{"instruction": asked, "response": answer} | SAME for asked, answer in ASKED]
WIDE = 100_000
DEEP = "[" * hostile.DEEP
FORMS = ("jsonl", "json", "csv", "parquet")


@pytest.fixture(scope="session")
def model() -> Model:
    return models.tiny_llama()


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form."""
    root = tmp_path_factory.mktemp("honest-data")
    (root / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    (root / "x.json").write_text(json.dumps(ROWS, ensure_ascii=False))
    lines = [",".join(ROWS[0]), *(",".join(f'"{value}"' for value in row.values()) for row in ROWS)]
    (root / "x.csv").write_text("\n".join(lines) + "\n")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), root / "x.parquet")
    return root


def use(file: Path, model: Model) -> None:
    """What a run does with a data file before its first step, and `compress` with a text."""
    encode_rows(model, data.read(str(file)), 64)
    data.read_text(file)


def line(**fields: Any) -> str:
    return json.dumps({"instruction": "a", "response": "b"} | fields) + "\n"


NAMED: dict[str, Callable[[], str]] = {
    "wide header.csv": lambda: ",".join(f"c{i}" for i in range(WIDE)) + "\n" + ",".join("v" * WIDE),
    "wide header twice.csv": lambda: ",".join(f"c{i}" for i in range(WIDE)) + ",c7\n",
    "same name.csv": lambda: ",".join(["c"] * WIDE) + "\n",
    "huge name.csv": lambda: "n" * 10**6 + "," + "n" * 10**6 + "\n",
    "open quote.csv": lambda: 'instruction,response\n"' + "a" * 10**6,
    "NUL.csv": lambda: "instruction,response\na\0,b\n",
    "deep.jsonl": lambda: DEEP,
    "deep in a field.jsonl": lambda: '{"instruction": ' + DEEP + "]" * hostile.DEEP + "}",
    "wide row.jsonl": lambda: json.dumps({f"c{i}": i for i in range(WIDE)}),
    "huge names.jsonl": lambda: json.dumps({f"{i}" * 10**5: 1 for i in range(9)}),
    "half a letter.jsonl": lambda: line(instruction="\ud800"),
    "huge number.jsonl": lambda: '{"instruction": ' + "9" * 10**5 + "}",
    "huge label.jsonl": lambda: '{"text": "a", "label": ' + "9" * 10**5 + "}",
    "NaN.jsonl": lambda: '{"instruction": NaN, "response": Infinity}',
    "blank.jsonl": lambda: "\n" * 10**6,
    "null.jsonl": lambda: "null\n" * 1000,
    "turns of another kind.jsonl": lambda: json.dumps({"messages": [5, None, [[]]]}),
    "no speaker.jsonl": lambda: json.dumps({"messages": [{"role": [], "content": {}}]}),
    "deep.json": lambda: DEEP,
    "deep in a list.json": lambda: "[" + DEEP + "]" * hostile.DEEP + "]",
    "open list.json": lambda: "[" + "{}," * 10**5,
    "one object.json": lambda: json.dumps({"a": {"b": ROWS}}, indent=1),
    "two lists.json": lambda: json.dumps({"a": ROWS, "b": ROWS}, indent=1),
    "number.json": lambda: "5",
    "nothing.json": lambda: "",
    "nothing.parquet": lambda: "",
    "magic alone.parquet": lambda: "PAR1PAR1",
    "long footer.parquet": lambda: "PAR1" + "\x7f" * 3 + "\x7f" + "PAR1",
}
ODD: dict[str, Callable[[], str]] = {
    "many turns.jsonl": lambda: json.dumps(
        {"messages": [{"role": r, "content": "a"} for _ in range(2_000) for r in ("user", "assistant")]}
    ),
    "control letters.jsonl": lambda: line(instruction="\x1b[2J\x00\u202e" * 1000),
    "other fields.jsonl": lambda: line(x=float("nan"), y=float("inf"), z=10**300, w=True, v=None),
}


@pytest.mark.parametrize("case", list(NAMED))
def test_a_file_that_an_attack_found_is_refused(tmp_path, model, case):
    put(tmp_path / case, NAMED[case]().encode("utf-8", "surrogatepass"))
    assert refusal(lambda: use(tmp_path / case, model)), f"{case}: accepted"


def test_the_honest_ones_are_accepted(honest, model):
    for form in FORMS:
        assert refusal(lambda form=form: use(honest / f"x.{form}", model)) is None  # type: ignore[misc]


@pytest.mark.parametrize("case", list(ODD))
def test_an_odd_file_is_read(tmp_path, model, case):
    put(tmp_path / case, ODD[case]().encode())
    encode_rows(model, data.read(str(tmp_path / case)), 64)


def cases(raw: bytes, form: str) -> dict[str, bytes | None]:
    found = hostile.mutants(raw, is_json=form.startswith("json"), seed=form)
    for name, text in hostile.OTHER_JSON.items():
        found[f"{name} as its first line"] = text + b"\n" + raw
        found[f"{name} as its last line"] = raw + text
        if form != "parquet":
            found[f"{name} in a field"] = raw.replace(b"it is 4,", text, 1)
    if form.startswith("json"):
        for name, changed in hostile.values(json.dumps(ROWS[0]).encode()).items():
            found[name] = changed + b"\n"
    return found


def sweep(file: Path, model: Model, damaged: Iterable[tuple[str, bytes | None]], injected: Injected) -> None:
    each = ((what, partial(put, file, changed)) for what, changed in damaged)
    hostile.survived("damaged data files", each, lambda: use(file, model), injected)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.faults)], ids=["a sample", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files(honest, tmp_path, model, injected, form, step):
    damaged = list(cases((honest / f"x.{form}").read_bytes(), form).items())[::step]
    sweep(tmp_path / f"x.{form}", model, damaged, injected)


@pytest.mark.faults
def test_parquet_with_many_bits_flipped(honest, tmp_path, model, injected):
    raw = (honest / "x.parquet").read_bytes()

    def flipped(bit: int) -> bytes:
        return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]

    damaged = ((f"bit {bit}", flipped(bit)) for bit in range(0, 8 * len(raw), 17))
    sweep(tmp_path / "x.parquet", model, damaged, injected)
