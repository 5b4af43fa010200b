"""`fleetune data check`, and `tune` on rows as people have them: columns, texts, folders, standard input."""

import io
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fleetune
from command_line import Capture, call, call_json, ok, refused
from fleetune import models
from fleetune.cli import console
from fleetune.cli.main import main
from fleetune.common.events import DataChecked
from fleetune.data import Example, read
from fleetune.data.encode import encode_all, prompt_ids
from fleetune.runs import rundir
from fleetune.tuning.prepare import data_check
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished
from heard import Heard

RUN = shlex.split("--method fedit --set r=2 --set steps=1 --clients 2 --rounds 1 --held-out 4 --samples 1")
RUN += shlex.split("--answer-tokens 2 --device cpu")


@pytest.fixture
def at(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model, and rows with columns of their own, of two shops."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    sizes = {i: 1 + i % 30 for i in range(24)}
    rows = [{"ask": f"what of {i}", "say": "word " * n, "shop": "ab"[i % 3 == 0]} for i, n in sizes.items()]
    rows[5] = rows[3] | {"shop": "a"}
    write(tmp_path / "own.jsonl", rows)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checked(capsys: Capture, *words: str) -> dict[str, Any]:
    (found,) = ok(capsys, "data", "check", *words)
    return found


COLUMNS = ("--columns", "prompt=ask,response=say,client=shop")


def test_a_check_says_what_tune_would_do(at, capsys):
    found = checked(capsys, "own.jsonl", *COLUMNS, "--model", "tiny", "--max-length", "64", "--held-out", "4")
    examples = read("own.jsonl", columns=COLUMNS[1])
    rows, _ = encode_all(examples, models.load("tiny").tokenizer, 10**6)
    lengths = sorted(len(row.ids) for row in rows)
    told = {"p50": lengths[11], "p95": lengths[22], "longest": lengths[-1], "total": sum(lengths)}
    assert found["lengths"] == {"unit": "tokens", **told}
    assert found["cut"] == sum(length > 64 for length in lengths)
    assert (found["rows"], found["training"], found["held_out"]) == (24, 20, 4)
    assert found["partition"] == "column:client"
    assert sorted(found["clients"]) == ["a", "b"]
    assert sum(found["rows_per_client"]) == 20
    assert found["equal_training"] + found["equal_held_out"] == 1
    assert any("are longer than max_length=64 and are cut" in text for text in found["remarks"])

    start = ok(capsys, "tune", "tiny", "own.jsonl", *COLUMNS, *RUN, "--clients", "0", "--max-length", "64")[0]
    assert start["rows_per_client"] == found["rows_per_client"]
    assert start["partition"] == "column:client"


def test_the_masked_part_of_a_row_is_shown(at, capsys):
    found = checked(capsys, "own.jsonl", *COLUMNS, "--model", "tiny", "--max-length", "64")
    assert len(found["samples"]) == 3
    first = found["samples"][0]
    assert first["row"] == 1
    assert first["not_trained"].endswith("<|im_start|>assistant\n")
    assert "what of 0" in first["not_trained"]
    assert first["trained"].startswith("word")
    assert "tokens cut]" in found["samples"][-1]["trained"], "the longest is cut"
    plain = checked(capsys, "own.jsonl", *COLUMNS)
    assert plain["lengths"]["unit"] == "words"
    assert (plain["cut"], plain["samples"][0]["not_trained"]) == (None, "what of 0")
    assert main(["data", "check", "own.jsonl", *COLUMNS]) == 0
    out = capsys.readouterr().out
    assert "in tokens, and what max_length=512 cuts: add --model MODEL" in out
    assert "┊ what of 0" in out
    assert "┃ word" in out
    assert "a 1" in out


def test_labels_and_rows_that_leak_are_told(at, capsys):
    rows = [{"text": f"it was {i} fine days by the sea", "label": i % 2} for i in range(20)]
    write(at / "labelled.jsonl", rows)
    write(at / "held.jsonl", [rows[3], {"text": "no", "label": 0}])
    found = checked(capsys, "labelled.jsonl", "--eval-data", "held.jsonl")
    assert found["labels"] == {"0": 11, "1": 11}
    assert (found["equal_training"], found["equal_held_out"]) == (0, 1)
    assert "1 of 2 held-out rows are trained on too (held.jsonl:1)" in found["remarks"][0]
    assert "trained on too" not in "".join(checked(capsys, "labelled.jsonl", "--held-out", "1")["remarks"])


def test_tune_tells_of_rows_that_leak_as_a_check_does(at, capsys):
    rows = [json.loads(line) for line in (at / "own.jsonl").read_text().splitlines()]
    write(at / "held.jsonl", [rows[7], {"ask": "what else", "say": "nothing", "shop": "a"}, rows[9]])
    words = ("own.jsonl", *COLUMNS, "--eval-data", "held.jsonl")
    (said,) = (r for r in checked(capsys, *words)["remarks"] if "trained on too" in r)
    assert said.startswith("2 of 3 held-out rows are trained on too (held.jsonl:1, held.jsonl:3)")
    tune = ("tune", "tiny", *words, *RUN, "--clients", "0")
    assert said in ok(capsys, *tune, "--dry-run")[-1]["remarks"]
    assert main([*tune]) == 0
    assert said in " ".join(" ".join(capsys.readouterr()).split())


def test_no_row_of_a_check_steers_the_terminal(at, capsys):
    write(at / "bad.jsonl", [{"text": f"a\x1b[2Jb{i}", "client": "\x1b]0;x\x07"} for i in range(4)])
    assert main(["data", "check", "bad.jsonl", "--partition", "column:client"]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())


def test_a_column_that_looks_like_clients_is_named_with_its_flag(at, capsys):
    told = (
        "the column 'client_id' looks like clients, and is not used: --partition column:client_id follows it"
    )
    write(at / "ids.jsonl", [{"prompt": f"p {i}", "response": "r", "client_id": i % 3} for i in range(12)])
    write(at / "alone.jsonl", [{"prompt": f"p {i}", "response": "r", "client_id": i} for i in range(12)])
    assert checked(capsys, "ids.jsonl")["remarks"].count(told) == 1
    for other in (["ids.jsonl", "--partition", "column:client_id"], ["alone.jsonl"]):
        assert told not in checked(capsys, *other)["remarks"]


def test_an_encoder_cuts_at_its_positions_where_the_tokenizer_states_no_length(at, capsys):
    models.tiny_bert(labels=("0", "1")).save(at / "bert")
    file = at / "bert" / "tokenizer_config.json"
    stated = json.loads(file.read_text())
    del stated["model_max_length"]
    file.write_text(json.dumps(stated))
    tokenizer = models.load_tokenizer("bert")
    assert tokenizer.model_max_length > 10**6
    write(at / "labelled.jsonl", [{"text": "word " * (1 + 20 * i), "label": i % 2} for i in range(8)])
    whole = [len(tokenizer(e.texts[0], verbose=False)["input_ids"]) for e in read("labelled.jsonl")]
    for most, limit in (("32", 32), ("512", 128)):
        found = checked(capsys, "labelled.jsonl", "--model", "bert", "--max-length", most)
        assert (found["lengths"]["longest"], found["cut"]) == (max(whole), sum(n > limit for n in whole))


def test_training_goes_on_with_plain_texts(at, capsys):
    rows = [{"text": f"{i} " + "a long tale " * (i % 12), "who": "xy"[i % 2]} for i in range(24)]
    write(at / "texts.jsonl", rows)
    words = ["tune", "tiny", "texts.jsonl", "--columns", "client=who", *RUN, "--max-length", "32"]
    code, (start, *_, done), err = call_json(capsys, *words)
    assert code == 0
    assert "are cut" not in err
    model, run = models.load("tiny"), rundir.listing(at / "runs")[-1]
    rows, kept = encode_all(read("texts.jsonl"), model.tokenizer, 32)
    assert len(rows) > 24
    held = finished.held_out(run)
    assert sum(start["rows_per_client"]) == len(rows) - len(encode_all(held, model.tokenizer, 32)[0])
    assert start["held_out"] == len(encode_all(held, model.tokenizer, 32)[0])
    assert done["tuned"]["loss"] != done["base"]["loss"]
    assert len(np.unique(kept)) == 24
    sample = json.loads((run / "eval.json").read_text())["samples"][0]
    assert sample["prompt"] + sample["reference"] in {e.response for e in held}
    (again,) = ok(capsys, "eval", "1", "--tasks", "loss,rouge", "--answer-tokens", "2", "--device", "cpu")
    assert again["loss"] == pytest.approx(done["tuned"]["loss"], abs=1e-6)


def test_columns_stay_with_the_run_and_its_recipe(at):
    recipe = 'model = "tiny"\ndata = "own.jsonl"\ncolumns = "prompt=ask,response=say"\n'
    (at / "recipe.toml").write_text(recipe)
    assert main(["tune", "-c", "recipe.toml", *RUN]) == 0
    run = rundir.listing(at / "runs")[-1]
    written = recipes.read(run / "run.toml")
    assert (written["columns"], written["partition"]) == ("prompt=ask,response=say", "iid")
    assert finished.held_out(run)[0].response.startswith("word")
    assert main(["tune", "-c", "recipe.toml", *RUN, "--columns", "prompt=say,response=ask"]) == 0
    assert finished.held_out(rundir.listing(at / "runs")[-1])[0].response.startswith("what of")


def test_a_table_of_a_spreadsheet_is_tuned_on_at_the_first_try(at, capsys):
    rows = [f"T-{i};Wie groß ist {i}?;So groß wie {i}, ungefähr;Verkauf" for i in range(24)]
    rows[5] = "T-5;Wie groß ist 5?;;Verkauf"
    head = "Ticket-Nr.;Kundenfrage (Text);Antwort, Support;Abteilung"
    (at / "faq.csv").write_bytes("\r\n".join([head, *rows]).encode("cp1252"))
    columns = "prompt=Kundenfrage (Text),response=Antwort\\, Support"
    assumed = f"columns assumed: --columns '{columns}'"
    said = checked(capsys, "faq.csv")["remarks"]
    assert said[1] == assumed
    assert said[2].startswith("1 of 24 rows is left out: column 'Antwort, Support' is empty (faq.csv:7)")
    assert main(["tune", "tiny", "faq.csv", *RUN]) == 0
    shown = "".join(capsys.readouterr())
    assert shown.count(assumed) == 1
    run = rundir.listing(at / "runs")[-1]
    assert recipes.read(run / "run.toml")["columns"] == columns
    table = '[columns]\nprompt = "Kundenfrage (Text)"\nresponse = "Antwort, Support"\n'
    (at / "recipe.toml").write_text(f'model = "tiny"\ndata = "faq.csv"\n{table}')
    assert recipes.make(recipes.read(at / "recipe.toml")).columns == columns
    strict = refused(capsys, "data", "check", "faq.csv", "--strict")
    assert "faq.csv:7: column 'Antwort, Support' is empty" in strict


def test_a_folder_of_splits_is_trained_on_its_first_and_never_on_its_test(at, capsys):
    (at / "data").mkdir()
    for name, count in (("train", 12), ("valid", 3), ("test", 5)):
        rows = [{"prompt": f"{name} {i}", "completion": "a"} for i in range(count)]
        write(at / "data" / f"{name}.jsonl", rows)
    found = checked(capsys, "data")
    assert (found["training"], found["held_out"], found["partition"]) == (12, 3, "iid")
    assert main(["tune", "tiny", "data", *RUN]) == 0
    run = rundir.listing(at / "runs")[-1]
    assert [e.messages[0][1] for e in finished.held_out(run)] == ["valid 0", "valid 1", "valid 2"]
    assert Path(recipes.read(run / "run.toml")["data"]) == Path("data/train.jsonl")


def test_columns_are_refused_before_a_model_is_read(at, capsys):
    err = refused(capsys, "tune", "nowhere/at-all", "own.jsonl", "--columns", "prompt=aks,response=say")
    assert "no column 'aks' to read as prompt" in err
    assert "did you mean 'ask'?" in err


def test_a_folder_is_a_fleet(at, capsys):
    (at / "devices").mkdir()
    for name, count in (("oslo", 6), ("bonn", 9)):
        rows = [{"prompt": f"{name} {i}", "completion": "a"} for i in range(count)]
        write(at / "devices" / f"{name}.jsonl", rows)
    start = ok(capsys, "tune", "tiny", "devices", *RUN, "--clients", "0")[0]
    assert (start["clients"], start["partition"], sum(start["rows_per_client"])) == (2, "column:client", 11)
    assert recipes.read(rundir.listing(at / "runs")[-1] / "run.toml")["partition"] == "column:client"


class Piped:
    """Standard input with these bytes."""

    def __init__(self, raw: bytes, *, terminal: bool = False) -> None:
        self.buffer, self.terminal = io.BytesIO(raw), terminal

    def isatty(self) -> bool:
        return self.terminal


def test_rows_from_standard_input_are_kept_for_a_resume(at, monkeypatch):
    raw = (at / "own.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", Piped(raw))
    assert main(["tune", "tiny", "-", *COLUMNS[:2], *RUN]) == 0
    (run,) = rundir.listing(at / "runs")
    digest = finished.stated_by(run)["digest"]
    kept = Path(recipes.read(run / "run.toml")["data"])
    assert kept.read_bytes() == raw
    assert kept.stat().st_mode & 0o077 == 0
    shutil.rmtree(run / "adapter")
    assert main(["tune", "--resume", "1"]) == 0, "it needs no standard input"
    assert finished.stated_by(run)["digest"] == digest


PIPED = [("tune", "tiny", "-", "--dry-run"), ("data", "check", "-"), ("tune", "tiny", "-")]


@pytest.mark.parametrize("words", PIPED)
def test_standard_input_without_rows_is_told(at, capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", Piped(b" \n"))
    assert "no row came from standard input" in refused(capsys, *words)
    monkeypatch.setattr(sys, "stdin", Piped(b"", terminal=True))
    assert "cat rows.jsonl | fleetune tune MODEL -" in refused(capsys, *words)
    monkeypatch.setattr(sys, "stdin", Piped((at / "own.jsonl").read_bytes()))
    assert main([*words, *COLUMNS, *(RUN if words[0] == "tune" else ())]) == 0
    assert (at / "runs").exists() == (words == ("tune", "tiny", "-"))


@pytest.mark.parametrize("words", PIPED[:2])
def test_bad_rows_from_standard_input_name_no_file_that_is_gone(at, capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", Piped(b'{"prompt": "a", "response": "b"}\n{bad\n{"prompt": "\x81"}\n'))
    err = refused(capsys, *words)
    assert "error: 2 of 3 rows of standard input cannot be used:\n  standard input:2: not JSON" in err
    assert "  standard input:3: neither UTF-8 nor cp1252" in err
    assert "fleetune-rows-" not in err


def test_a_device_reads_the_same_forms(at, capsys, monkeypatch):
    pytest.importorskip("flwr")
    from fleetune.fleet import device
    from fleetune.fleet.worker import Brings

    write(at / "texts.jsonl", [{"text": f"tale {i}"} for i in range(6)])
    training, held = Brings("texts.jsonl", held_out=2).divided()
    assert (len(training), len(held), held[0].messages) == (4, 2, ())
    training, _ = Brings("own.jsonl", columns="prompt=ask,response=say").divided()
    assert training[0].messages == (("user", "what of 0"),)

    joined: list[Brings] = []
    monkeypatch.setattr(device, "join", lambda address, brings, *a, **k: joined.append(brings) or "bye")
    assert main(["fleet", "join", "h:1", "--data", "own.jsonl", "--columns", "prompt=ask,response=say"]) == 0
    assert joined[0].columns == "prompt=ask,response=say"
    monkeypatch.setattr(sys, "stdin", Piped((at / "own.jsonl").read_bytes()))
    assert main(["fleet", "join", "h:1", "--data", "-", "--columns", "prompt=ask,response=say"]) == 0
    assert len(joined[1].divided()[0]) == 24
    assert Path(joined[1].data).parent == Path("fleetune-device")
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    write(at / "talks.jsonl", [{"messages": talk[:2]}, {"messages": talk}])
    assert main(["fleet", "join", "h:1", "--data", "talks.jsonl", "--train-turns", "all"]) == 0
    said = [row.response for row in joined[2].divided()[0]]
    assert said == ["assistant 0", "assistant 2", "assistant 0", "assistant 1"]
    words = ("fleet", "join", "h:1", "--data", "talks.jsonl", "--train-turns", "some")
    assert "--train-turns some is not one of last, all" in refused(capsys, *words)
    words = ("fleet", "join", "h:1", "--data", "own.jsonl", "--columns", "promt=ask")
    assert "Did you mean 'prompt'?" in refused(capsys, *words)


def test_rows_of_a_run_are_measured_by_the_columns_that_it_read(at, capsys):
    mapping = ["--columns", "prompt=ask,response=say"]
    assert main(["tune", "tiny", "own.jsonl", *mapping, *RUN]) == 0
    write(at / "named.jsonl", [{"prompt": "what of 1", "response": "word word"}])
    write(at / "more.jsonl", [{"ask": "what of 1", "say": "word word"}])
    write(at / "third.jsonl", [{"q": "what of 1", "a": "word word"}])
    files = (["more.jsonl"], ["named.jsonl"], ["third.jsonl", "--columns", "prompt=q,response=a"])
    loss = ("--tasks", "loss", "--device", "cpu")
    found = [ok(capsys, "eval", "latest", *words, *loss)[-1]["loss"] for words in files]
    assert found[0] == found[1] == found[2]
    write(at / "none.jsonl", [{"n": 1}])
    assert main(["eval", "latest", "none.jsonl", "--device", "cpu"]) == 2
    assert main(["eval", "tiny", "more.jsonl", *mapping, "--tasks", "loss", "--device", "cpu"]) == 0


@pytest.mark.parametrize("text", ['You\'re "brief", ü 😀,\n{{ kind }} \\ %}', ""])
def test_a_system_sentence_is_that_of_the_rows_and_of_every_template_that_comes_of_them(at, text):
    """Training, evaluation, an exported folder and a compressed model begin a conversation with the same tokens."""
    mapped = {"prompt": "ask", "response": "say", "system": f"'{text}'"}
    options = {"method": "fedit", "rounds": 1, "clients": 2, "held_out": 4, "samples": 0, "device": "cpu"}
    run = fleetune.tune("tiny", "own.jsonl", settings={"r": 2, "steps": 1}, columns=mapped, **options)
    assert {row.messages[0] for row in fleetune.open(run).held_out()} == {("system", text)}
    turns = (("system", text), ("user", "why"))
    trained = prompt_ids(Example(turns, "", {}), models.load_tokenizer("tiny"), 10**6).tolist()
    folder = fleetune.export(run, to="hf").path
    small = fleetune.compress(run, method="rtn", settings={"group": 8}, windows=1, length=16)
    for tokenizer in (run.model().tokenizer, models.load_tokenizer(str(folder)), small.model().tokenizer):
        for begun in (turns, turns[1:]):
            assert prompt_ids(Example(begun, "", {}), tokenizer, 10**6).tolist() == trained
    assert fleetune.verify(folder, run)
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert (f"turns[0] is the system's {text!r}" in card) == bool(text)
    heard = Heard()
    fleetune.export(run, to="gguf:lora", listener=heard)
    assert "note: the system sentence is not in this file" in "\n".join(heard.notes)
    write(at / "named.jsonl", [{"prompt": "what of 1", "response": "word word"}])
    write(at / "more.jsonl", [{"ask": "what of 1", "say": "word word"}])
    losses = [fleetune.evaluate(run, f"{name}.jsonl", tasks=["loss"]) for name in ("named", "more")]
    assert losses[0] == losses[1]


def test_a_system_sentence_goes_to_rows_without_one_and_needs_a_place_in_a_template(at, capsys):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own = {"role": "system", "content": "mine"}
    write(at / "talks.jsonl", [{"messages": talk}, {"messages": [own, *talk]}])
    found = read("talks.jsonl", columns="system='Be brief, do'")
    assert [row.messages[0][1] for row in found] == ["Be brief, do", "mine"]
    words = ("data", "check", "own.jsonl", "--columns", "prompt='ask',response=say")
    assert "prompt is a column, no text" in refused(capsys, *words)
    plain = models.tiny_llama()
    plain.tokenizer.chat_template = None
    plain.save(at / "plain")
    said = ("--columns", "prompt=ask,response=say,system='Be brief'")
    assert "has no chat template" in refused(capsys, "tune", "plain", "own.jsonl", *said, *RUN)
    scales = ("--method", "fedpetuning", "--train", "scales", "--base", "mapped")
    assert "train = scales leaves as it is" in refused(capsys, "tune", "no.gguf", "own.jsonl", *said, *scales)


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help all.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "has", "columns"),
    [
        (CHATML, True, "prompt=ask,response=say"),
        (CHATML, False, "prompt=ask,response=say,system=shop"),
        (CHATML.partition("{% endif %}")[2], False, "prompt=ask,response=say"),
        ("{{ raise_exception('no') }}", False, "prompt=ask,response=say"),
        (None, False, "prompt=ask,response=say"),
    ],
    ids=["own", "given", "none", "refuses", "plain"],
)
def test_a_template_s_own_system_sentence_is_said(at, template, has, columns):
    tokenizer = models.load_tokenizer("tiny")
    tokenizer.chat_template = template
    examples = read("own.jsonl", columns=columns)
    said = data_check.about_template(tokenizer, examples)
    assert len(said) == has
    assert all("'You help all.'" in line and "system='TEXT'" in line for line in said)


def test_a_long_look_says_what_it_does(tiny, capsys, monkeypatch):
    def slow(*args: Any, **options: Any) -> DataChecked:
        time.sleep(0.3)
        return look(*args, **options)

    look = data_check.check
    monkeypatch.setattr(data_check, "check", slow)
    monkeypatch.setattr(console, "BEAT", 0.01)
    monkeypatch.setattr(console, "SOON", 0.0)
    code, _, err = call(capsys, "data", "check", "demo", "--model", tiny)
    assert code == 0
    assert err.startswith(f"reading the rows, and the tokenizer of {tiny}")
