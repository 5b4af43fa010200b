"""The plan: counts, bytes and memory against real models, messages and rounds; what is given up so that a method fits."""

import dataclasses
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import fleetune
from command_line import ok
from fleetune import adapters, models, seeds
from fleetune.cli.commands import tune
from fleetune.cli.main import build_parser, main
from fleetune.common.events import PlanRow
from fleetune.data import Encoded, collate
from fleetune.errors import FitError, ModelError, UsageError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import Model, shapes, tiny_llama
from fleetune.models.tiny import tiny_bert, tiny_roberta
from fleetune.planning import device_cost, plan
from fleetune.planning.device_cost import Workload
from fleetune.planning.plan import PlanSearch
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

ROOT = Path(__file__).resolve().parents[2]
RATES = device_cost.Rates(flops=1e11, copy=1e10)
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 72}
SMALL |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("llama", {"num_key_value_heads": 6, "vocab_size": 90}),
        ("mistral", {"head_dim": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ],
)
def test_a_llama_is_counted_from_its_configuration(family, more, tied):
    config = AutoConfig.for_model(family, **(SMALL | more), tie_word_embeddings=tied)
    shape = shapes.shape_of(config)
    net = AutoModelForCausalLM.from_config(config)
    assert shape.params == sum(p.numel() for p in net.parameters())
    assert shape.largest == max(p.numel() for p in net.parameters())
    counted = shapes.counted(config)  # the other way to the same layers
    assert sorted(shape.linears) == sorted(counted.linears)
    assert (shape.vocab, shape.hidden, shape.layers) == (counted.vocab, counted.hidden, counted.layers)


def test_what_has_no_place_on_a_model_is_not_planned():
    gpt2 = AutoConfig.for_model("gpt2", vocab_size=60, n_embd=32, n_layer=2, n_head=4)
    bloom = AutoConfig.for_model("bloom", vocab_size=60, hidden_size=32, n_layer=2, n_head=4)
    mamba = AutoConfig.for_model("mamba", vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    everything = {*methods.entries(), *device_cost.COMPARISON}
    without = {"fedpetuning", "fedpeptao", "fwdllm"}
    for config, missing in ((gpt2, set()), (bloom, {"fedpeptao"}), (mamba, without)):
        found = {row.method for row in plan.table(config, device_cost.Workload(), rates=RATES)}
        assert everything - found == missing
    assert {x.name.rpartition(".")[2] for x in shapes.shape_of(mamba).linears} == {"in_proj"}


def test_llama_7b_gives_the_figures_of_the_papers():
    assert shapes.shape_of(LLAMA_7B).params == 6_738_415_616
    text = dict(plan.describe(LLAMA_7B, "llama-7b", device_cost.Workload()))["state only"]
    assert "13.5 GB to run in fp16" in text
    assert "108 GB to tune with Adam" in text


def test_time_follows_the_rates():
    config = AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True)
    work = device_cost.Workload(batch=2, length=10, steps=7)
    only_products = device_cost.Rates(flops=1e6, copy=1e30)
    seconds = {r.method: r.seconds for r in plan.table(config, work, rates=only_products)}
    block = 2 * 48 * 48 + 2 * 16 * 48 + 3 * 48 * 72
    head = 2 * 20 * 60 * 48
    forward = 2 * 20 * 3 * block + head + 4 * 20 * 10 * 48 * 3
    assert seconds["fedkseed"] == seconds["mezo"] == pytest.approx(7 * 2 * forward / 1e6)
    assert seconds["full Adam"] == pytest.approx(7 * (3 * forward + head) / 1e6)
    assert seconds["inference"] is None
    rates = device_cost.Rates(1e9, 1e9), device_cost.Rates(4e9, 4e9)
    slow, fast = ([r.seconds for r in plan.table(config, work, rates=each)] for each in rates)
    assert [s / 4 for s in slow if s] == pytest.approx([s for s in fast if s])


def _rows(ram: int | None, **peaks: int) -> list[PlanRow]:
    same: dict[str, Any] = {"model": "m", "note": "", "parts": {"weights": 5}, "trainable": 1, "passes": 2}
    same |= {"ram": ram, "bytes_up": 1, "bytes_down": 1, "seconds": 60.0, "sending": None}
    return [
        PlanRow(method=name, tunes=name in methods.entries(), peak=peak, fits=plan.fit(peak, ram), **same)
        for name, peak in peaks.items()
    ]


@pytest.mark.parametrize(
    ("peak", "text"),
    [(3.6e9, "yes"), (3.6e9 + 1, "yes, tight"), (4e9, "yes, tight"), (7.9e9, "no: 3.90 GB short")],
)
def test_fit_in_words(peak, text):
    (row,) = _rows(4_000_000_000, mezo=int(peak))
    assert row.fits == text
    assert plan.cells(row)[-1] == text
    assert plan.columns([row])[-1] == "fits 4.00 GB"


def test_recommended_methods_come_first_unless_their_sending_is_slow():
    rows = _rows(100, fedkseed=50, mezo=50, fedpetuning=60, fedit=90, inference=10)
    assert plan.order(rows) == ["fedit", "fedpetuning", "fedkseed", "mezo"]
    slow = [dataclasses.replace(r, sending=61.0) if r.method == "fedit" else r for r in rows]
    assert plan.order(slow) == ["fedpetuning", "fedkseed", "mezo", "fedit"]
    unknown = [dataclasses.replace(r, peak=None) if r.method == "fedit" else r for r in rows]
    assert "fedit" not in plan.order(unknown)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": -1}, {"steps": 0}, {"dtype": "int4"}])
def test_work_that_cannot_be(wrong):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        device_cost.Workload(**wrong)


def test_the_command_says_that_nothing_fits_after_the_table(tiny, capsys):
    assert main(["plan", tiny, "--ram", "100MB", "--json"]) == 3
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["plan"] * 12 + ["error"]
    assert events[-1]["exit_code"] == 3
    assert "no method fits 100 MB: the smallest, " in events[-1]["message"]
    assert events[0]["fits"].startswith("no: ")
    assert events[0]["peak"] == sum(events[0]["parts"].values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["fedit", "fedpetuning", "fedpeptao", "full SGD"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_autograd_keeps_is_counted(family, method, dtype):
    bert, wide = family == "bert", {"hidden": 48, "heads": 6, "kv_heads": 2}
    model = tiny_bert(layers=12) if bert else tiny_llama(layers=12, **wide)
    model.net.to(models.DTYPES[dtype])
    if method == "full SGD":
        model.net.requires_grad_(True)
    else:
        methods.make(method, {}).init(model, 1)
    model.net.train()
    rows = [Encoded(np.arange(40 - 3 * i, dtype=np.int32), 39 - 3 * i) for i in range(3)]  # one scored token
    if model.labels:
        rows = [Encoded(row.ids, 0, row.ids * 0, 1) for row in rows]
    stored = {p.untyped_storage().data_ptr() for p in model.net.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in stored:
            seen[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_tensor(model, collate(rows, 0))
    bytes_kept = sum(t.untyped_storage().nbytes() for t in seen.values())
    shape = shapes.shape_of(model.net.config)
    comparisons = device_cost.COMPARISON
    footprint = comparisons[method] if method in comparisons else methods.make(method, {}).footprint(shape)
    expected = device_cost.activation_bytes(shape, device_cost.Workload(3, 40, 1, dtype), footprint.module)
    assert expected == pytest.approx(bytes_kept, rel=0.03)


NEAR = 0.15
measured_here = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.version.cuda is not None,
    reason="the plan's floor was measured with torch for the CPU on Linux",
)


@pytest.fixture(scope="module")
def compiled() -> None:
    """The kernels are compiled and cached: a process that compiles them needs more memory, once in a life."""
    model = tiny_llama()
    method = methods.make("mezo", {"tau": 2, "batch_size": 1})
    message = encode(Message(1, bytes(8), method.broadcast(method.init(model, 5))))
    list(LocalFleet(model, method, [[Encoded(np.arange(9, dtype=np.int32), 4)]], 0, 0).ask(1, [0], message))


@measured_here
@pytest.mark.slow
@pytest.mark.parametrize("name", [*methods.entries(), *device_cost.COMPARISON])
@pytest.mark.parametrize(("model", "work"), [("smollm2-135m", (4, 128)), ("minilm-l6", (16, 64))])
@pytest.mark.usefixtures("compiled")
def test_predicted_memory_of_real_models(model, work, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    plan_memory = importlib.import_module("benchmarks.plan_memory")
    found = plan_memory.compare(model, [name], *work, 2, "fp32", "memory", 1)[name]
    assert found["planned"] == pytest.approx(found["peak"], rel=NEAR)


@pytest.mark.parametrize("more", [{"mu": 0.1}, {"scaffold": True}, {"wire": "sign"}])
@pytest.mark.parametrize("name", ["fedit", "fedpetuning"])
def test_the_copies_of_fedprox_and_scaffold_are_counted(name, more):
    shape, work = shapes.shape_of(LLAMA_7B), device_cost.Workload(batch=1, length=64)
    plain, kept = (methods.make(name, given) for given in ({}, more))
    module = plain.footprint(shape)
    parts = [device_cost.memory(shape, work, method.footprint(shape)) for method in (plain, kept)]  # type: ignore[arg-type]
    copies = 4 if "scaffold" in more else 1
    assert sum(parts[1].values()) - sum(parts[0].values()) == copies * 4 * module.module.size


@pytest.mark.parametrize(("word", "counted"), [("auto", 104), ("numba", 104), ("torch", 10)])
def test_the_plan_counts_the_memory_of_the_chosen_kernels(monkeypatch, word, counted):
    monkeypatch.setenv(seeds.VARIABLE, word)
    rows = plan.table(tiny_llama().net.config, device_cost.Workload(), rates=RATES)
    floor = {row.method: row.parts["floor"] for row in rows}
    for name in ("mezo", "zosgd", "fedkseed", "onebyte"):
        assert floor[name] - floor["inference"] == counted * device_cost.MIB
    assert floor["full SGD"] == floor["inference"]


def test_the_plan_counts_the_time_of_the_chosen_kernels(monkeypatch):
    config, work, seconds = tiny_llama().net.config, device_cost.Workload(steps=5), {}
    for word in ("auto", "numba", "torch"):
        monkeypatch.setenv(seeds.VARIABLE, word)
        seconds[word] = {row.method: row.seconds for row in plan.table(config, work, rates=RATES)}
    assert seconds["auto"] == seconds["numba"]
    more = device_cost.SWEEP["torch"] - device_cost.SWEEP["numba"]
    weights = 4 * shapes.shape_of(config).params
    assert seconds["torch"]["mezo"] - seconds["numba"]["mezo"] == pytest.approx(5 * 2 * more * weights / 1e10)
    assert seconds["torch"]["full SGD"] == seconds["numba"]["full SGD"]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fedit", {"variant": "ffa"}),
    ("fedit", {"variant": "sb", "start": "pissa"}),
]
ADAPTED = [*((name, {}) for name in ("fedit", "fedpetuning", "fedpeptao", "fwdllm")), *VARIANTS]
TARGETS = ("all-linear", "query-value", "LAST, 1.SECOND")
ADAPTED += [(name, {"targets": t}) for name in ("fedit", "fedpetuning", "fwdllm") for t in TARGETS]
MODELS = {"llama": tiny_llama, "bert": tiny_bert, "roberta": tiny_roberta}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("name", "values"), ADAPTED)
def test_what_a_method_trains_is_what_it_attaches(name, values, family):
    last, second = {"llama": ("down_proj", "self_attn.o_proj")}.get(family, ("dense", "attention.self.key"))
    values = {n: text.replace("LAST", last).replace("SECOND", second) for n, text in values.items()}
    model = MODELS[family]()
    method = methods.make(name, values | ({"r": 4} if "start" in values else {}))
    module = method.footprint(shapes.shape_of(model.net.config)).module
    method.init(model, 1)
    trained = {n: tuple(p.shape) for n, p in adapters.trainable(model).items()}
    assert module.tensors == trained
    assert module.size == sum(p.numel() for p in adapters.trainable(model).values())
    assert module.frozen == (
        sum(a.size for a in adapters.start_factors(model).values()) if "variant" in values else 0
    )


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=40),
        st.tuples(st.sampled_from(["uint8", "int16", "float32"]), st.lists(st.integers(0, 300), max_size=2)),
        max_size=20,
    ),
    st.dictionaries(st.text(max_size=5), st.integers(0, 1 << 63) | st.floats(allow_nan=False), max_size=3),
)
@settings(max_examples=60)
def test_message_bytes_is_the_length_of_the_message(arrays, scalars):
    payload = Payload({n: np.zeros(shape, kind) for n, (kind, shape) in arrays.items()}, scalars)
    told = {n: (kind, tuple(shape)) for n, (kind, shape) in arrays.items()}
    assert plan.message_bytes(told, scalars) == len(encode(Message(1, bytes(8), payload)))


def _filled(method: Any, model: Model) -> Any:
    """A state whose sums need their full 32 bits, of a method that has sums."""
    state = method.init(model, (1 << 63) + 5)
    if not hasattr(state, "ledger"):
        return state
    if hasattr(state, "places"):  # a round's entries
        rows = [n for n in method.rows(state) for _ in range(method.r)]
        return method.written(state, [np.ones(n) for n in rows])
    ledger = state.ledger.append(np.zeros(1, np.uint64), np.array([1 << 20]), 1)
    head = dataclasses.replace(ledger.head, run_key=(1 << 63) + 7)
    state = state._replace(ledger=dataclasses.replace(ledger, head=head))
    return state._replace(step=4096) if hasattr(state, "step") else state


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", methods.entries())
def test_traffic_is_that_of_a_real_round(name, family):
    model = MODELS[family]()
    ids = np.arange(9, dtype=np.int32)
    row = Encoded(ids, 0, ids * 0, 1) if model.labels else Encoded(ids, 4)
    more = {"layers_rule": "all"} if name == "fedpeptao" else {}  # all layers travel, and nothing is measured
    method = methods.make(name, more).sized(3, 2)
    if name == "signlora" and model.labels:
        assert method.footprint(shapes.shape_of(model.net.config)) is None
        with pytest.raises(ModelError, match="no classification head"):
            method.init(model, 1)
        return
    message = encode(Message(1, bytes(8), method.broadcast(_filled(method, model))))
    (answer,) = LocalFleet(model, method, [[row] * plan.ROWS], 0, 0).ask(1, [0], message)
    assert answer.data is not None, answer.reason
    table = plan.table(model.net.config, device_cost.Workload(batch=2, length=9, steps=3), rates=RATES)
    planned = next(r for r in table if r.method == name)
    assert (planned.bytes_up, planned.bytes_down) == (len(answer.data), len(message))


GB = 10**9


@pytest.fixture(scope="module")
def shape() -> Any:
    """A model of 30 M parameters, of which back-propagation needs much more than its weights."""
    return shapes.shape_of(models.tiny_llama(vocab=8192, hidden=512, layers=8, heads=8).net.config)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is simply rows x tokens x bytes of a weight, and an evaluation takes none."""

    def memory(shape: Any, work: Workload, footprint: Footprint) -> dict[str, int]:
        return {"weights": work.batch * work.length * work.size * (footprint.gradient != "none")}

    monkeypatch.setattr(plan, "SERVER", 0)
    monkeypatch.setattr(device_cost, "FLOOR", 0)
    monkeypatch.setattr(plan, "_cached", lambda shape, work: 0)
    monkeypatch.setattr(device_cost, "memory", memory)


def found(shape: Any, ram: int, *order: str, **more: Any) -> tuple[str, int, int, str]:
    best = PlanSearch(shape, ram, **more).best(order or ("fedit",))
    return best.method, best.work.batch, best.work.length, best.work.dtype


@pytest.mark.usefixtures("counted")
def test_rows_are_given_up_first_then_tokens_then_the_type(shape):
    def at(rows: int, tokens: int, size: int) -> tuple[str, int, int, str]:
        return found(shape, rows * tokens * size * 10 // 9 + 1)

    assert at(8, 512, 4) == ("fedit", 8, 512, "fp32")
    assert at(7, 512, 4) == ("fedit", 4, 512, "fp32")
    assert at(1, 512, 4) == ("fedit", 1, 512, "fp32")
    assert at(1, 511, 4) == ("fedit", 1, 256, "fp32")
    assert at(1, 64, 4) == ("fedit", 1, 64, "fp32")
    assert at(1, 64, 2) == ("fedit", 1, 64, "bf16")


@pytest.mark.usefixtures("counted")
def test_the_first_method_that_can_be_made_to_fit_is_taken_and_a_tight_fit_last(shape):
    small = 64 * 2
    assert found(shape, small * 10 // 9 + 1, "fedpetuning", "fedit")[0] == "fedpetuning"
    assert found(shape, small, "fedpetuning", "fedit") == ("fedpetuning", 1, 64, "bf16")  # tight
    with pytest.raises(FitError) as error:
        found(shape, small - 28, "fedpetuning", "fedit")
    assert error.value.message == (
        "no method fits 100 B: the smallest, fedit with 1 x 64 tokens a step in bf16, base mapped, needs 28 B more (128 B, of "
        "which 128 B are weights)"
    )


@pytest.mark.usefixtures("counted")
def test_what_was_asked_for_stays(shape):
    asked = {"batch": 3, "length": 100, "dtype": "fp32"}
    assert found(shape, 100_000, asked=asked) == ("fedit", 3, 100, "fp32")
    assert found(shape, 500, asked={"batch": 3}) == ("fedit", 3, 64, "bf16")
    assert found(shape, 4_000, asked={"length": 512}) == ("fedit", 1, 512, "fp32")
    with pytest.raises(FitError) as error:
        found(shape, 1_000, asked=asked)
    assert "3 x 100 tokens a step in fp32" in error.value.message
    assert error.value.hint == "leave out --batch, --length, --dtype, or take a smaller model"


def test_the_peak_is_that_of_the_step_or_of_the_evaluation(shape):
    every = list(PlanSearch(shape, GB).tried("fedit"))
    tried = {(s.work.batch, s.work.length, s.work.dtype): s for s in every if s.work.base == "memory"}
    mapped = {(s.work.batch, s.work.length, s.work.dtype): s for s in every if s.work.base == "mapped"}
    assert len(tried) == len(mapped) == 4 * 4 * 2
    assert all(mapped[key].peak < s.peak for key, s in tried.items() if key[2] == "fp32")
    assert [s.work.base for s in every[:4]] == ["memory", "mapped"] * 2  # before anything is made smaller
    work = Workload(8, 512)
    footprint = methods.make("fedit", {}).footprint(shape)
    server = plan.SERVER * 4 * footprint.module.size
    assert tried[8, 512, "fp32"].peak == sum(device_cost.memory(shape, work, footprint).values()) + server
    one = Workload(1, 64)
    measured = sum(device_cost.memory(shape, Workload(8, 64), Footprint("none")).values())
    step = device_cost.memory(shape, one, footprint)
    assert tried[1, 64, "fp32"].peak == max(measured, sum(step.values())) + server
    assert tried[1, 64, "fp32"].weights == step["weights"]
    few = device_cost.memory(shape, Workload(1, 512), footprint)
    every_row = device_cost.memory(shape, work, Footprint("none"))
    found = next(s for s in PlanSearch(shape, GB, {"batch": 1}).tried("fedit"))
    # an evaluation is of 8 rows
    assert found.peak == max(sum(few.values()), sum(every_row.values())) + server


def test_the_printed_command_makes_tune_use_what_was_planned(large, tmp_path, capsys):
    every = list(PlanSearch(shapes.shape_of(models.load_config(large)), 1).tried("fedit"))
    ram = min(s.peak for s in every) * 10 // 9 + 1
    (wanted, *_) = [s.work for s in every if s.peak <= 0.9 * ram]
    assert wanted.base == "mapped"
    told = ok(capsys, "plan", large, "--ram", str(ram))[-1]
    assert told["event"] == "plan_settings"
    stated = {"method": "fedit", "dtype": wanted.dtype, "base": "mapped", "ram": ram}
    assert told.items() >= stated.items()
    assert told["batch_size"] < 8
    assert told["peak"] <= 0.9 * ram
    assert main(["plan", large, "--ram", str(ram)]) == 0
    out = capsys.readouterr().out
    assert told["command"] in out
    size = f"{told['batch_size']} x {told['max_length']} tokens a step in {wanted.dtype}"
    assert f"fedit with {size}, base mapped: about " in out
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {i}", "response": "b"}) + "\n" for i in range(6)))
    words = [str(rows) if word == "DATA" else word for word in shlex.split(told["command"])[1:]]
    recipe = tune.recipe_of(build_parser().parse_args(words), print)
    assert told["batch_size"] == methods.make(recipe.method, recipe.set).batch_size
    assert [told[n] == getattr(recipe, n) for n in ("max_length", "dtype", "base")] == [True] * 3


def test_the_function_returns_the_settings_as_arguments_of_tune(large):
    whole = fleetune.plan(large, ram="64GB")
    assert whole.settings().options() == {"method": "fedit"}
    assert whole.settings().method == "fedit"
    assert whole.settings().work.length == plan.longest() == 512
    small = fleetune.plan(large, ram="64GB", batch=3, length=100, dtype="fp32").settings()
    assert small.options() == {"method": "fedit", "settings": {"batch_size": 3}, "max_length": 100}
    with pytest.raises(UsageError, match="--batch 0 must"):
        fleetune.plan(large, batch=0)
    assert device_cost.Workload().batch == 8
