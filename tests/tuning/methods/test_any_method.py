"""What holds of every method: any objective, the largest integers of a reply, and checkpoints that change no bit."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods_harness import CLIENTS, begun, bits, gathered, usual

from fleetune import models
from fleetune.data import Encoded, Example
from fleetune.data.encode import Batches, encode_all
from fleetune.errors import RecipeError
from fleetune.evaluation import objectives
from fleetune.models import Model, tiny_llama
from fleetune.models.net import layers
from fleetune.privacy.mechanism import Privacy, PrivateSum
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import PRIVATE, Rule
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods._zeroth import UNITS
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

# Few steps, on all six rows at once; perturbations so large that a step function is no constant; rates that descend with
# any key (at three times the rate, one key in four does not).
WALK = {"K": 64, "tau": 40, "lr": 3e-4, "eps": 0.02, "batch_size": 6}
SETTINGS: dict[str, dict[str, Any]] = dict.fromkeys(("mezo", "zosgd", "fedkseed"), WALK) | {
    "onebyte": {"K": 64, "directions": 40, "lr": 2e-3, "eps": 0.02, "batch_size": 6},
    "fwdllm": {"targets": "all-linear", "P": 40, "lr": 5e-3, "decay": 0, "h": 0.02, "batch_size": 6}
    | {"patience": 1, "discriminative": False},
}
# How many tokens the model prefers to the right one, a token: whole numbers, so no gradient anywhere.
RANKS = """
values = []

def rank(model, batch):
    logits = model.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels, scored = batch.labels[:, 1:].clamp(min=0), batch.labels[:, 1:] >= 0
    right = logits.gather(2, labels.unsqueeze(2))
    values.append(float((logits > right).sum(2)[scored].double().mean()) / 10)
    return values[-1]
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    (tmp_path / "ranks_of_tokens.py").write_text(RANKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("ranks_of_tokens", None)
    import ranks_of_tokens

    found: list[float] = ranks_of_tokens.values
    return found


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [Example((("user", f"say {n}"),), "yes" if n % 2 else "no", {}) for n in range(6)]
    return encode_all(examples, tiny_llama().tokenizer, 48)[0]


def one_round(method: Any, model: Model, rows: list[Encoded]) -> tuple[Any, Payload]:
    state = method.init(model, 5)
    reply = method.local(model, method.broadcast(state), Batches(rows, 257, 9), 9, {})
    return method.aggregate(state, [Reply(0, 9, reply)]), reply


def slopes(method: Any, reply: Payload) -> np.ndarray:
    ((name, sent),) = reply.arrays.items()
    if name == "g":
        return sent.astype(np.float64)
    return -(LogCode.decode(sent) if name == "codes" else sent) / UNITS


@pytest.mark.parametrize("name", SETTINGS)
def test_a_round_steps_by_what_a_function_without_gradient_says(name, rows, ranks):
    method = methods.make(name, SETTINGS[name] | {"objective": "ranks_of_tokens:rank"})
    model = tiny_llama()
    state, reply = one_round(method, model, rows)
    pairs = np.array(ranks).reshape(40, 2)
    g = (pairs[:, 0] - pairs[:, 1]) / (2 * 0.02)
    assert np.count_nonzero(g) > 30
    assert np.all(np.abs(slopes(method, reply) - g) <= np.abs(g) / 8 + 1 / UNITS)  # a byte's step
    assert reply.scalars["loss"] == pytest.approx(pairs.mean())
    method.apply(model, state)
    (batch,) = Batches(rows, 257, 9).steps(1, len(rows))
    assert objectives.get(method.objective)(model, batch) < pairs[0].mean() - 1


BOTH = ("fedit", "fedpetuning")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fedit", {"start": "magic"}, "one of default, gaussian"),
    ("fedit", {"start": "orthogonal", "r": 3}, "even rank"),
    ("fedit", {"start": "pissa"}, "dropout=0"),
    ("fedit", {"start": "olora", "dropout": 0, "wire": "sign"}, "wire=fp32"),
    ("fedit", {"start": "pissa", "dropout": 0, "average": "product"}, "average=separate"),
    ("fedit", {"ranks": "2,4"}, "average=product"),
    *(("fedit", {"ranks": k, "average": "product"}, "1 to r = 16") for k in ("2,17", "0", "2;4")),
    ("fedit", {"ranks": "2", "average": "product", "start": "orthogonal"}, "orthogonal"),
    ("fedit", {"average": "product", "server": "adam"}, "average=separate"),
    ("fedit", {"average": "product", "scaffold": True}, "average=separate"),
    ("fedit", {"average": "product", "server_lr": 0.5}, "average=separate"),
    ("fedit", {"wire": "fp16"}, "neither fp32 nor sign"),
    ("fedit", {"wire": "sign", "scaffold": True}, "wire=fp32"),
    ("fedit", {"wire": "sign", "average": "product"}, "wire=fp32"),
    ("fedit", {"wire": "sign", "dropout": 0, "start": "pissa"}, "wire=fp32"),
    *((name, {"server": "fedadm"}, "avg, avgm, adam") for name in BOTH),
    *((name, {"server_lr": -1}, "server lr") for name in BOTH),
    ("fedit", {"server_lr": float("nan")}, "server lr = nan must be 0"),
    *((name, {"scafold": True}, "Did you mean 'scaffold'") for name in BOTH),
    *((name, {"targets": "q_proj,,v_proj"}, "or the layers' names") for name in (*BOTH, "fwdllm")),
    ("fedpetuning", {"start": "pissa", "module": "adapter"}, "module=lora"),
    ("fedpetuning", {"start": "pissa", "wire": "sign"}, "wire=fp32"),
    ("fedpetuning", {"start": "orthogonal", "size": 5}, "even rank"),
    ("fedpetuning", {"module": "magic"}, "one of full, prefix"),
    ("fedpetuning", {"places": "sideways"}, "neither houlsby nor pfeiffer"),
    ("fedpetuning", {"size": -1}, "must be positive"),
    ("fedpetuning", {"module": "prompt", "size": 4097}, "4096 tokens at most"),
    ("fedpetuning", {"module": "bitfit", "size": 4}, "no size to choose"),
    ("fedpetuning", {"module": "prefix", "targets": "all-linear"}, "needs module=lora"),
    ("fedpetuning", {"module": "lora", "places": "pfeiffer"}, "needs module=adapter"),
    ("fedpetuning", {"lr": -1.0}, "must be positive"),
    ("fedpetuning", {"wire": "int8"}, "neither fp32 nor sign"),
    ("fedpetuning", {"epochs": 0}, "at least 1"),
    ("fedpeptao", {"layers_rule": "halve"}, "lipschitz, half, all, nor a number"),
    ("fedpeptao", {"layers_rule": "0"}, "nor a number"),
    ("fedpeptao", {"beta": 1}, "not in [0, 1)"),
    ("fedpeptao", {"tokens": 0}, "at least 1"),
    ("fedpeptao", {"tokens": 4097}, "tokens may be 4096 at most"),
    ("fedpeptao", {"lanczos": 1}, "lanczos at least 2"),
    ("fedpeptao", {"lanczos": 301}, "lanczos 300"),
    ("fedpeptao", {"lr": 0}, "lr = 0.0 must be positive"),
    ("fwdllm", {"P": 0}, "P = 0"),
    ("fwdllm", {"h": 0}, "h, lr and threshold"),
    ("fwdllm", {"threshold": -1}, "h, lr and threshold"),
    ("fwdllm", {"decay": -1}, "decay and clip"),
    ("fwdllm", {"clip": -1}, "decay and clip"),
    ("fwdllm", {"module": "bitfit", "r": 4}, "bitfit has none"),
    ("fwdllm", {"module": "adapter", "targets": "all-linear"}, "needs module=lora"),
    ("fwdllm", {"module": "prefix"}, "module = 'prefix' is not one of lora, adapter, bitfit"),
    ("fedkseed", {"K": 100}, "power of two"),
    ("fedkseed", {"K": -1}, "K"),
    *(("fedkseed", {"backprop": share}, "whole percent") for share in (0.125, 1.5, -0.1)),
    ("fedkseed", {"backprop": 0.5, "law": "gaussian"}, "law=hashed"),
    ("fedkseed", {"backprop": 0.5, "objective": "accuracy"}, "objective=loss"),
    ("fedkseed", {"backprop": 0.5, "pro": True}, "pro=false"),
    ("fedkseed", {"backprop_lr": 0.0}, "backprop_lr"),
    ("fedkseed", {"backprop_steps": 0}, "backprop_steps"),
    ("fedkseed", {"server_lr": -1.0}, "server_lr"),
    ("onebyte", {"directions": 0}, "directions = 0"),
    ("onebyte", {"directions": 65, "K": 64}, "65 is not between 1 and the 64"),
    ("onebyte", {"wire": "bit"}, "'bit'"),
    ("onebyte", {"clip": -1.0}, "clip"),
    ("onebyte", {"lr": 0.0}, "lr"),
    *((name, {"K": 48}, "power of two") for name in ("onebyte", "zosgd")),
    ("signlora", {"r": 9}, "r = 9 must be at least 1 and at most pool = 8"),
    ("signlora", {"r": 0}, "r = 0 must be at least 1"),
    ("signlora", {"pool": 1025}, "that at most 1024"),
    *(("signlora", {"planes": n}, f"planes = {n} must be 1 to 8") for n in (0, 9)),
    ("signlora", {"stay": 0}, "stay = 0 at least 1"),
    ("signlora", {"share": "0"}, "share = '0' must be numbers from 1 to 1024, as 1,4"),
    ("signlora", {"share": "1,,4"}, "share = '1,,4' must be numbers"),
    ("signlora", {"lr": 0.0}, "lr = 0.0 must be positive"),
    *(("signlora", {"lr": lr}, "has no grid of fp32") for lr in (2e7, 1e-45)),
    ("signlora", {"targets": "q_proj,"}, "targets = 'q_proj,'"),
    *((name, {"objective": "acuracy"}, "unknown objective 'acuracy'") for name in SETTINGS),
]


@pytest.mark.parametrize(("name", "settings", "said"), REFUSED)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(name, settings, said):
    with pytest.raises(RecipeError) as refused:
        prepare.check(recipe.make({"model": "none", "data": "none", "method": name, "set": settings}))
    assert said in str(refused.value)


@pytest.mark.parametrize("verbose", [False, True])
def test_a_fault_of_an_objective_is_one_line_unless_more_is_wanted(verbose, rows, tmp_path, caplog):
    (tmp_path / "mine.py").write_text("def f(model, batch):\n    return {}['nothing']\n")
    method = methods.make("mezo", {"lr": 1e-4, "objective": f"{tmp_path}/mine.py:f"})
    model = tiny_llama()
    fleet = LocalFleet(model, method, [rows], 3, 257, memories=Memories(tmp_path / "memories"))
    sent = encode(Message(1, b"12345678", method.broadcast(method.init(model, 5))))
    caplog.set_level(logging.INFO if verbose else logging.WARNING, logger="fleetune")
    answer = fleet._answer(1, 0, 9, sent)
    assert answer.status == "failed"
    assert answer.reason.endswith("failed: KeyError: 'nothing' (mine.py:2)")
    assert ("Traceback" in caplog.text) == verbose


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"tau": 3, "K": 16}) for name in ("mezo", "zosgd", "fedkseed")),
    ("fedkseed", {"tau": 3, "K": 16, "server_lr": 64.0}),
    ("onebyte", {"directions": 3, "K": 16}),
    ("onebyte", {"directions": 3, "K": 16, "wire": "sign"}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda c: str(c).replace(" ", ""))
@pytest.mark.parametrize("end", ["min", "max"])
def test_the_largest_integers_that_pass_the_door_are_taken(name, settings, end):
    method, model = methods.make(name, settings), tiny_llama()
    state = method.init(model, 5)
    for _ in range(3):
        spec = method.expects(state)
        arrays = {
            n: np.full([abs(side) for side in shape], getattr(np.iinfo(kind), end), kind)
            for n, (kind, shape) in spec.arrays.items()
        }
        scalars = {n: 3 if kind is int else 1.0 for n, (kind, _, _) in spec.scalars.items()}
        state = method.aggregate(state, iter([Reply(0, 9, Payload(arrays, scalars))]))
    assert np.abs(state.ledger.coefficients.astype(np.int64)).max(initial=0) < 1 << 31


BASE = b"12345678"
ROWS = [Encoded(np.arange(i, i + 12, dtype=np.int32), 4) for i in range(6)]
FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedit": ("fedit", {"dropout": 0.2}),
    "fedpeptao": ("fedpeptao", {"layers_rule": "half", "tokens": 3}),
} | {
    module: ("fedpetuning", {"module": module})
    for module in ("full", "prefix", "adapter", "lora", "bitfit", "prompt")
}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_no_bit_of_a_reply(kind, monkeypatch):
    name, settings = KINDS[kind]
    monkeypatch.setattr(layers, "SMALL", 0)  # else so small a batch keeps its activations
    real, runs = layers.checkpoint, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(layers, "checkpoint", counted)
    sent, used = [], []
    for on in (True, False, "auto"):
        model, before = models.tiny_llama(seed=2), runs
        model.ram = 1  # no room
        method: Any = methods.make(name, {**FAST, **settings, "checkpointing": on})
        fleet = LocalFleet(model, method, [ROWS], 7, 0)
        state = method.init(model, 5)
        message = encode(Message(1, BASE, method.kinds(state)[0][0]))
        (answer,) = fleet.ask(1, [0], message)
        assert answer.data is not None, answer.reason
        sent.append(answer.data)
        used.append(runs - before)
    assert sent[0] == sent[1] == sent[2]
    assert used[0] == used[2] > 0 == used[1]


PRIVATELY = Rule(PRIVATE, privacy=Privacy(1.0, 1.0, 1.0, CLIENTS))


@pytest.mark.parametrize(
    "case", ["fedit", "fedit sign", "fedkseed", "fedkseed bp", "mezo", "onebyte", "onebyte sign"]
)
def test_of_a_private_round_the_state_keeps_the_noisy_sum_alone(case, tmp_path, monkeypatch):
    """Checkpoints of fedkseed held the sizes of the slopes of each client, without noise."""
    method, state = begun(case)
    assert not method.rule_problem(PRIVATELY, CLIENTS)
    monkeypatch.setattr(PrivateSum, "tensors", lambda sums: {n: t + 1.0 for n, t in sums._start.items()})
    states = []
    for clients in (range(CLIENTS), range(0)):
        with gathered(
            method, state, [usual(method, state, c) for c in clients], tmp_path, rule=PRIVATELY
        ) as taken:
            states.append(bits(taken.aggregate()))
            assert taken.accepted == len(clients)
    assert states[0] == states[1] != bits(state)
