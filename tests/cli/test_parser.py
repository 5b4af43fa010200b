"""Lines in the words of other tools, and what they are in ours.  No torch, no model."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import compression
from fleetune.cli import main, parser
from fleetune.cli.console import Ui
from fleetune.common import words
from fleetune.deploy import targets
from fleetune.errors import FleetuneError, RecipeError, UsageError
from fleetune.tuning import methods
from fleetune.tuning.recipe import recipe

LINES = {
    "train m d": "tune m d",
    "--offline tune m d": "tune --offline m d",
    "finetune m d --lr 1e-4": "tune m d --set lr=1e-4",
    "tune m d --learning_rate=1e-4 --rounds 2": "tune m d --set lr=1e-4 --rounds 2",
    "tune m d --batch-size 4 --lora-r 8 --lora-alpha 32": "tune m d --set batch_size=4 --set r=8 --set alpha=32",
    "tune m d --epochs 3": "tune m d --rounds 3",
    "tune m d --epochs 3 --rounds 2": "tune m d --set epochs=3 --rounds 2",
    "tune m d --method LoRA": "tune m d --method fedit",
    "tune m d --method=qlora": "tune m d --method fedit --base mapped",
    "tune m d --qlora": "tune m d --method fedit --base mapped",
    "tune m d --load-in-4bit --rounds 2": "tune m d --base mapped --rounds 2",
    "tune m d --load_in_4bit True --bits 4": "tune m d --base mapped --base mapped",
    "tune m d --max_length 128 -o there": "tune m d --max-length 128 --out there",
    "tune m d --dtype bfloat16": "tune m d --dtype bf16",
    "lora --model m --train --data d --iters 600": "tune --method fedit --model m --data d --rounds 10 --set steps=60",
    "fleet start -c r.toml": "fleet serve -c r.toml",
    "run m": "chat m",
    "generate --model m --prompt 'a b' --temp 0.5": "chat m --prompt 'a b' --temperature 0.5",
    "eval latest --data rows.jsonl": "eval latest rows.jsonl",
    "measure --model=m latest": "measure m latest",
    "quantize m --wbits 4 --group-size 64": "compress m --bits 4 --set group=64",
    "compress m --method gptq": "compress m --method optq",
    "convert m --outfile a.gguf --outtype q8_0": "export m --path a.gguf --to gguf:q8_0",
    "export 3 -o a.gguf": "export 3 --path a.gguf",
    "export 3 --out a.gguf": "export 3 --path a.gguf",
    "data demo": "data check demo",
    "data rows.csv": "data check rows.csv",
    "models smollm2": "models list smollm2",
    "runs 3": "runs show 3",
    "pull m": "models pull m",
    "rm m": "models rm m",
    "list": "models",
    "ps": "runs",
    "show latest": "runs show latest",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_another_tool_is_read_as_ours(line):
    args = main.parse(shlex.split(line))
    ours = main.parse(shlex.split(LINES[line]))
    assert args.understood.partition("   ")[0] == f"understood as: fleetune {LINES[line]}"
    assert ours.understood == ""
    assert vars(args) | {"understood": ""} == vars(ours)


def test_a_word_may_follow_the_options():
    after, before = (
        main.parse(f"fleet join {w}".split()) for w in ("--data r.jsonl a.invite", "a.invite --data r.jsonl")
    )
    assert vars(after) == vars(before)
    with pytest.raises(UsageError, match="unknown argument 'b'"):
        main.parse(["fleet", "join", "a.invite", "--data", "r.jsonl", "b"])


def test_what_is_not_quite_the_same_is_said():
    told = main.parse(["tune", "m", "d", "--epochs", "3", "--bits", "4"]).understood
    assert all(words.REMARKS[word] in told for word in ("epochs", "base=mapped"))
    assert words.REMARKS["epochs"] not in main.parse(shlex.split("tune m d --rounds 2 --epochs 3")).understood


@pytest.mark.parametrize(
    "line", ["tunes m d", "tune m d --round 2", "tune m d --iters many", "models pul", "data chek rows.csv"]
)
def test_what_is_no_word_of_anybody_is_refused(line):
    with pytest.raises(UsageError):
        main.parse(line.split())


FLAGS = {n: parser.OptionReader(n, sub) for n, sub in main.command_parsers().items()}


@given(st.data())
def test_a_line_in_our_words_stays_as_it_is(data):
    name = data.draw(st.sampled_from(sorted(FLAGS)))
    flags = {f: a for f, a in FLAGS[name].flags.items() if a.nargs != 0}
    text = st.text("abc/.=-_ 0", min_size=1).filter(lambda t: not t.startswith("-"))
    said = []
    for flag in data.draw(st.lists(st.sampled_from(sorted(flags)))):
        value = data.draw(st.sampled_from(flags[flag].choices) if flags[flag].choices else text)
        ways = [[flag, str(value)], [f"{flag}={value}"]] if flag[:2] == "--" else [[flag, str(value)]]
        said += data.draw(st.sampled_from(ways))
    said += data.draw(st.lists(text))
    assert parser.OptionReader(name, FLAGS[name].sub).read(said) == said


def test_every_word_of_the_tables_means_something_of_ours():
    known = main.command_parsers()
    for line in words.COMMANDS.values():
        flags = [word for word in line.split() if word.startswith("--")]
        assert line.split()[0] in known
        assert set(flags) <= set(FLAGS[line.split()[0]].flags)
    for command, table in {"tune": words.RECIPE, **words.OPTIONS}.items():
        for word in table.values():
            for name in words.meaning(word, 1):
                flag = "--set" if name.startswith("set.") else f"--{name.replace('_', '-')}"
                assert flag in FLAGS[command].flags or FLAGS[command]._place(name) == 0, (command, word)
    settings = {w[4:].partition("=")[0] for w in words.RECIPE.values() if w.startswith("set.")}
    assert all(methods.having([name]) for name in settings)
    assert not set(words.RECIPE) & set(recipe.fields())
    of_solvers = {s.name for name in compression.entries() for s in compression.settings_of(name)}
    assert {w[4:] for w in words.OPTIONS["compress"].values() if w.startswith("set.")} <= of_solvers
    assert set(words.VALUES["to"].values()) <= set(targets.every())
    assert set(words.VALUES["method"].values()) <= {*methods.entries(), *compression.entries()}
    for flag, *rest in map(str.split, words.TYPES.values()):
        main.parse(["compress", "m", flag, *rest])
        if flag == "--set":
            compression.make("qronos", dict([rest[0].split("=")]))


@pytest.mark.parametrize("word", words.ELSEWHERE)
def test_what_needs_no_command_is_said(word):
    with pytest.raises(UsageError) as caught:
        main.parse(["fleet", word, "press-3"])
    assert caught.value.hint == words.ELSEWHERE[word]


def test_a_recipe_has_the_same_words():
    both = {"model": "m", "data": "d"}
    made = recipe.make(both | {"method": "lora", "lr": 1e-4, "lora_r": 8, "epochs": 3, "cutoff_len": 64})
    assert (made.method, made.rounds, made.max_length) == ("fedit", 3, 64)
    assert made.set == {"lr": 1e-4, "r": 8}
    assert recipe.make(both | {"K": 64, "set": {"learning_rate": 1e-6}}).set == {"K": 64, "lr": 1e-6}
    assert recipe.make(both | {"load_in_4bit": False}).base == "auto"
    with pytest.raises(RecipeError):
        recipe.make(both | {"learning": 1})


def test_a_target_is_found_in_any_case_and_by_the_names_of_llama_cpp():
    assert targets.find("GGUF").name == "gguf"
    assert targets.find("Q8_0").name == targets.find("GGUF:Q8_0").name == "gguf:q8_0"


def test_bits_that_a_plain_model_does_not_have_are_refused_with_the_compression_that_makes_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = main.parse(shlex.split("export m --to gguf:Q4_K_M"))
    with pytest.raises(FleetuneError) as caught:
        main.COMMANDS.load("export").run(args, Ui())
    assert caught.value.hint == "fleetune compress m --bits 4   then: fleetune export latest --to gguf"
    assert main.parse(["compress", "m", "--type", "Q5_K_M"]).bits == 5
    for said in ("--method Q4_K_M", "--set grid=q4_0"):
        with pytest.raises(UsageError, match="is a type of llama") as caught:
            main.COMMANDS.load("compress").run(main.parse(shlex.split(f"compress m {said} --dry-run")), Ui())
        assert caught.value.hint == "for a file of about that size: fleetune compress m --bits 4"
    with pytest.raises(UsageError, match="no text file"):  # a grid of that name is one
        main.COMMANDS.load("compress").run(
            main.parse(shlex.split("compress m --set grid=q4_k --text gone.txt")), Ui()
        )
