# SPDX-License-Identifier: Apache-2.0
"""The view: what a net computes through it is what it would compute with the weights written, and nothing is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fleetune.data.encode import Batch, collate, encode_all
from fleetune.data.examples import Example
from fleetune.errors import ModelError
from fleetune.evaluation.objectives import get
from fleetune.models import DTYPES, Model, digest, named_tensors, tiny_llama, uniform
from fleetune.seeds import ledger as ledgers
from fleetune.seeds import noise
from fleetune.seeds import weights as views
from fleetune.seeds.descent import Position, descend, two_point
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import Tape, View
from fleetune.seeds.weights import WeightSlot, kernels, layout, read_stored
from law_definition import slow_places

KEY, GRID, EPS, K = 0xFEEDFACE12345678, float(np.float32(3e-6)), 1e-2, 32
IDS = np.array([3, 17, 1 << 32 | 3, 5 << 32 | 31], np.uint64)
COEFFICIENTS = np.array([900, -1500, 400, 8193], np.int64)
DIRECTION = 5 << 32 | 7
TOKENS = torch.tensor([[5, 9, 200, 5, 0, 263, 44], [1, 1, 2, 3, 120, 7, 8]])


# --- nets ---------------------------------------------------------------------------------------------------


def llama(tied: bool) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def gpt2() -> Any:  # Conv1D, LayerNorm with a bias, position embeddings, tied
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=264,
            n_positions=64,
            n_embd=24,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def qwen() -> Any:  # linear layers with a bias, tied
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


NETS: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: llama(True),
    "untied llama": lambda: llama(False),
    "gpt2": gpt2,
    "qwen2": qwen,
}


def make(name: str, dtype: str = "fp32") -> Any:
    """A net with weights that are a function of their names alone; every tensor, biases too, is random."""
    with torch.random.fork_rng(devices=[]):
        net = NETS[name]()
    for n, tensor in named_tensors(net):
        bound = 0.02 if "bias" in n else 0.15 if tensor.dim() == 2 else 1.0
        tensor.data.copy_(torch.from_numpy(uniform(n, tuple(tensor.shape), bound)))
    return net.eval().requires_grad_(False).to(DTYPES[dtype])


def view_of(net: Any, law: str = "hashed", **options: Any) -> View:
    return View(named_tensors(net), net, run_key=KEY, law=law, grid=GRID, **options)


def logits(net: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return net(input_ids=tokens).logits.clone()


# --- the reference, from the definition -----------------------------------------------------------------------


@cache
def direction(law: str, id: int, start: int, count: int) -> np.ndarray:
    """z, element by element of the definition: int64 [count]."""
    if law == "rademacher":
        return noise.signs(KEY, id, start, count).astype(np.int64)
    epoch, k = divmod(id, 1 << 32)
    H = np.array([[(-1) ** bin(i & j).count("1") for j in range(K)] for i in range(K)])
    return noise.signs(KEY, epoch, start, count).astype(np.int64) * H[slow_places(K, start, count), k]


def reference(
    named: Iterable[tuple[str, Tensor]], law: str, entries: Iterable[tuple[int, int]], eps: float = 0.0
) -> list[tuple[str, Tensor]]:
    """round((w0 + grid * sum c z) + eps z'), each float32 operation by itself, rounded to the dtype once."""
    found, start = [], 0
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        n = tensor.numel()
        w = tensor.detach().float().numpy().reshape(-1)
        acc = np.zeros(n, np.int64)
        for id, c in entries:
            acc += c * direction(law, id, start, n)
        w = w + np.float32(GRID) * acc.astype(np.float32)
        w = w + np.float32(eps) * direction(law, DIRECTION, start, n).astype(np.float32)
        assert w.dtype == np.float32
        found.append((name, torch.from_numpy(w).to(tensor.dtype).view(tensor.shape)))
        start += -(-n // 4096) * 4096
    return found


ENTRIES = list(zip(IDS.tolist(), COEFFICIENTS.tolist(), strict=True))


def placed(view: View, eps: float = 0.0) -> View:
    """The view at the point of ENTRIES, probed by eps along DIRECTION."""
    view.place(passes(view.law, K, IDS, COEFFICIENTS))
    if eps:
        view.probe(probe(view.law, K, DIRECTION), eps)
    return view


def written(net: Any, tensors: Iterable[tuple[str, Tensor]]) -> Any:
    """The net with these tensors as its stored weights."""
    known = dict(named_tensors(net))
    for name, tensor in tensors:
        known[name].copy_(tensor)
    return net


# --- logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(NETS))
def test_logits_are_those_of_written_weights_bit_for_bit(name, dtype):
    # The tensors are small enough to be multiplied whole, so that even the order of the sums is the same.
    net, other = make(name, dtype), make(name, dtype)
    stored = digest(named_tensors(net))
    view = placed(view_of(net))
    for eps in (0.0, EPS, -EPS):
        view.probe(probe("hashed", K, DIRECTION) if eps else None, eps)
        want = reference(named_tensors(net), "hashed", ENTRIES, eps)
        assert torch.equal(logits(net), logits(written(other, want))), eps
        assert not torch.equal(logits(net), logits(make(name, dtype)))
    assert digest(named_tensors(net)) == stored


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("chunk", [1, 100, 5000])
def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch, name, dtype, chunk):
    # A product of fewer rows may sum in another order: equal up to some roundings of the type, not bit for bit.
    net, other = make(name, dtype), make(name, dtype)
    monkeypatch.setattr(views, "CHUNK", chunk)
    placed(view_of(net), EPS)
    want = logits(written(other, reference(named_tensors(net), "hashed", ENTRIES, EPS)))
    noise = 16 * torch.finfo(DTYPES[dtype]).eps * float(want.abs().max())
    assert float((logits(net) - want).abs().max()) <= noise
    moved = float((logits(make(name, dtype)) - want).abs().max())
    assert moved > 2 * noise  # the point is elsewhere, so a view that did nothing would show


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_other_laws(law):
    net, other = make("tied llama"), make("tied llama")
    placed(view_of(net, law), EPS)
    if law == "rademacher":
        want = reference(named_tensors(net), law, ENTRIES, EPS)
        assert torch.equal(logits(net), logits(written(other, want)))
        return
    start = 0
    moved = []
    for name, tensor in named_tensors(net):  # in floats, so the ids ascend, and equality is up to rounding
        z = {
            i: noise.normals(KEY, i, start, tensor.numel()).astype(np.float64)
            for i in (*IDS.tolist(), DIRECTION)
        }
        w = (
            tensor.double().numpy().reshape(-1)
            + GRID * sum(c * z[i] for i, c in ENTRIES)
            + EPS * z[DIRECTION]
        )
        moved.append((name, torch.from_numpy(w.astype(np.float32)).view(tensor.shape)))
        start += -(-tensor.numel() // 4096) * 4096
    torch.testing.assert_close(logits(net), logits(written(other, moved)), rtol=1e-4, atol=1e-4)
    assert float((logits(net) - logits(make("tied llama"))).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["tied llama", "gpt2"])
def test_generation_works_through_a_view(name):
    net, other = make(name), make(name)
    placed(view_of(net), 0.1)
    written(other, reference(named_tensors(net), "hashed", ENTRIES, 0.1))
    answers = []
    for model in (net, other, make(name)):
        with torch.inference_mode():
            answers.append(
                model.generate(
                    TOKENS,
                    attention_mask=torch.ones_like(TOKENS),
                    max_new_tokens=12,
                    do_sample=False,
                    pad_token_id=0,
                ).tolist()
            )
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


# --- nothing is written ---------------------------------------------------------------------------------------


class Boom(Exception):
    """An error of a test's own."""


@pytest.mark.parametrize("name", list(NETS))
def test_the_stored_weights_never_change_not_even_when_a_layer_fails(monkeypatch, name):
    net, failing = make(name, "bf16"), []
    stored, ids = digest(named_tensors(net)), [id(p) for p in net.parameters()]
    norm = type([m for m in net.modules() if "Norm" in type(m).__name__][-1])
    real = norm.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if failing and failing.pop() is Boom:
            raise Boom
        return real(*args, **kwargs)

    monkeypatch.setattr(norm, "forward", forward)
    view = placed(view_of(net), EPS)
    before = logits(net)
    for later in range(3):  # in the first, the second, the third norm
        failing += [Boom] + [None] * later
        with pytest.raises(Boom):
            logits(net)
        assert not failing
    assert torch.equal(logits(net), before)
    assert digest(named_tensors(net)) == stored
    assert [id(p) for p in net.parameters()] == ids
    view.remove()
    assert torch.equal(logits(net), logits(make(name, "bf16")))


def test_remove_gives_the_net_back():
    net = make("gpt2")
    modules = {n: type(m).forward for n, m in net.named_modules()}
    view = placed(view_of(net), EPS)
    assert any("forward" in m.__dict__ for m in net.modules())
    with pytest.raises(ModelError, match="already wrapped"):
        view_of(net)
    view.remove()
    assert not any("forward" in m.__dict__ for m in net.modules())
    assert {n: type(m).forward for n, m in net.named_modules()} == modules
    assert torch.equal(logits(net), logits(make("gpt2")))
    view_of(net).remove()
    view.remove()  # twice is once


@pytest.mark.parametrize("name", list(NETS))
def test_a_view_at_the_base_is_the_base(name):
    net = make(name, "fp16")
    view = placed(view_of(net), EPS)
    view.place(None)
    view.probe(None)
    assert torch.equal(logits(net), logits(make(name, "fp16")))
    view.place(passes("hashed", K, np.array([1, 1], np.uint64), np.array([5, -5])))  # moves that cancel
    assert torch.equal(logits(net), logits(make(name, "fp16")))
    assert digest(view.tensors()) == digest(named_tensors(net))


def test_tensors_that_no_forward_asks_for_are_told(caplog):
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).requires_grad_(False)
    view = View(list(net.named_parameters()), net, run_key=KEY, law="rademacher", grid=GRID)
    net["used"](torch.zeros(1, 3))
    with caplog.at_level(logging.WARNING):
        view.warn_unreached()
    assert "2 tensors took no part in the forward pass, e.g. idle.bias" in caplog.text
    caplog.clear()
    view.warn_unreached()
    view.remove()
    View(list(net.named_parameters()), net, run_key=KEY, law="rademacher", grid=GRID).warn_unreached()
    assert not caplog.records  # once for a net, whose view is made anew


class Mixer(nn.Module):
    """A module that reads its child's tensors and never calls it, as Mamba's mixer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T + self.inner.bias


def test_tensors_that_a_parent_reads_are_at_the_point():
    net = Mixer().requires_grad_(False)
    view = placed(View(list(net.named_parameters()), net, run_key=KEY, law="hashed", grid=GRID))
    moved, x = dict(view.tensors()), torch.ones(1, 3)
    assert torch.equal(net(x), x @ moved["inner.weight"].T + moved["inner.bias"])
    assert not torch.equal(net(x), x @ net.inner.weight.T + net.inner.bias)  # nobody runs: what is stored
    assert net.inner.weight is view.slots[1].tensor
    heard: dict[int, Tensor] = {}
    with Tape(view, heard.__setitem__), torch.enable_grad():
        assert torch.equal(net(x), x @ moved["inner.weight"].T + moved["inner.bias"])
        net(x).sum().backward()
    slots = {slot.name: slot.start for slot in view.slots}
    assert torch.equal(heard[slots["inner.weight"]], torch.ones(2, 3))
    assert torch.equal(heard[slots["inner.bias"]], torch.ones(2))
    view.remove()
    assert type(net.inner._parameters) is dict
    assert not {"forward"} & (net.__dict__.keys() | net.inner.__dict__.keys())


# --- the seam to the base ---------------------------------------------------------------------------------------


def test_only_the_embedding_rows_in_use_are_read():
    net, asked = make("untied llama"), []

    def read(slot: WeightSlot, first: int, last: int) -> Tensor:
        asked.append((slot.name, first, last))
        return read_stored(slot, first, last)

    placed(view_of(net, read=read), EPS)
    logits(net, torch.tensor([[7, 263, 7, 0]]))
    width = 32
    rows = [(a, b) for name, a, b in asked if name == "model.embed_tokens.weight"]
    assert rows == [(r * width, (r + 1) * width) for r in (0, 7, 263)]
    assert max(last - first for _, first, last in asked) <= views.CHUNK


@pytest.mark.parametrize("name", ["gpt2", "untied llama"])
def test_the_base_may_lie_elsewhere(name):
    # The stored parameters are rubbish; the base comes from a table, as from a mapped or quantised file.
    want = logits(written(make(name), reference(named_tensors(make(name)), "hashed", ENTRIES)))
    table = {n: t.clone().view(-1) for n, t in named_tensors(make(name))}
    net = make(name)
    for _, tensor in named_tensors(net):
        tensor.fill_(float("nan"))
    view = placed(view_of(net, read=lambda slot, first, last: table[slot.name][first:last].clone()))
    assert torch.equal(logits(net), want)
    view.place(None)
    assert torch.equal(logits(net), logits(make(name)))


def test_scratch_is_bounded(monkeypatch):
    monkeypatch.setattr(views, "CHUNK", 1000)
    net, sizes = make("tied llama"), []
    real = View._sweep

    def watched(view: View, out: Tensor, *rest: Any) -> None:
        sizes.append(out.numel())
        real(view, out, *rest)

    monkeypatch.setattr(View, "_sweep", watched)
    view = placed(view_of(net), EPS)
    logits(net)
    list(view.tensors())
    assert max(sizes) <= 1000
    assert view._scratch.numel() <= 1000


# --- tensors --------------------------------------------------------------------------------------------------

GOLDEN = "eda21ad7ba134ea1da5645fee7af938bbcbe1551ef97d9036579fb8e801e1052"


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(NETS))
def test_tensors_are_the_reference_replay(monkeypatch, name, dtype, law):
    net = make(name, dtype)
    want = digest(reference(named_tensors(net), law, ENTRIES))
    assert want != digest(named_tensors(net))
    for chunk, backend, threads in ((1 << 20, "numba", 1), (777, "numba", 2), (4096, "torch", 1)):
        monkeypatch.setattr(views, "CHUNK", chunk)
        view = placed(view_of(net, law, backend=backend, threads=threads))
        assert digest(view.tensors()) == want
        order = np.array([2, 0, 3, 1])
        view.place(passes(law, K, IDS[order], COEFFICIENTS[order]))
        assert digest(view.tensors()) == want
        view.remove()


def test_a_rebuilt_model_never_changes():
    model = tiny_llama()
    view = placed(view_of(model.net))
    assert digest(view.tensors()) == GOLDEN
    assert model.digest == digest(named_tensors(model.net))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_write_makes_the_point_the_stored_weights(monkeypatch, dtype):
    monkeypatch.setattr(views, "CHUNK", 1234)
    net = make("gpt2", dtype)
    want = digest(reference(named_tensors(net), "hashed", ENTRIES))
    view = placed(view_of(net))
    view.write()
    assert digest(named_tensors(net)) == want
    assert digest(view.tensors()) == want  # and it is not moved twice
    assert net.lm_head.weight is net.transformer.wte.weight


def test_tied_tensors_count_once_and_tensors_start_at_whole_tiles():
    net = make("gpt2")
    slots = layout(named_tensors(net))
    names = [s.name for s in slots]
    assert names == sorted(names)
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    end = 0
    for slot in slots:
        assert slot.start % 4096 == 0
        assert end <= slot.start < end + 4096
        end = slot.start + slot.tensor.numel()
    assert [s.name for s in layout(reversed(named_tensors(net)))] == names


def test_backends():
    assert kernels(torch.device("cpu")).__name__.endswith("kernels_numba")
    assert kernels(torch.device("cpu"), "torch").__name__.endswith("kernels_torch")
    assert kernels(torch.device("meta")).__name__.endswith("kernels_torch")


# --- the two points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_two_points_are_w_plus_and_minus_eps_z_exactly(dtype, law):
    net = make("tied llama", dtype)
    view, seen = placed(view_of(net, law)), []

    def loss() -> float:
        seen.append(digest(view.tensors()))
        return 0.0

    two_point(view, probe(law, K, DIRECTION), EPS, loss)
    named = named_tensors(net)
    assert seen == [digest(reference(named, law, ENTRIES, e)) for e in (EPS, -EPS)]
    assert digest(view.tensors()) == digest(reference(named, law, ENTRIES))
    if dtype == "fp32":  # in words: the point, and eps added or taken away
        point = dict(reference(named, law, ENTRIES))
        view.probe(probe(law, K, DIRECTION), EPS)
        for slot, (name, plus) in zip(view.slots, view.tensors(), strict=True):
            step = torch.from_numpy(direction(law, DIRECTION, slot.start, plus.numel())).view(plus.shape)
            assert torch.equal(plus, point[name] + step.float() * EPS)


# --- drift ----------------------------------------------------------------------------------------------------

STEPS, LR, DRIFT_EPS = 200, 1e-6, 1e-3


def rows(model: Model) -> list[Batch]:
    examples = [Example((("user", f"what is {i}?"),), "a number" if i % 2 else "yes", {}) for i in range(8)]
    encoded = encode_all(examples, model.tokenizer, 64)[0]
    return [collate([encoded[i]], 257) for i in range(8)]


def sized(dtype: str) -> Model:
    model = tiny_llama(seed=1)
    model.net.to(DTYPES[dtype])
    return model


def rms(tensors: Iterable[Tensor]) -> float:
    return float(torch.cat([t.double().reshape(-1) for t in tensors]).square().mean().sqrt())


def our_way(dtype: str, law: str, path: Path) -> float:
    """The same number of steps through a view; the distance to the replay of the ledger, over the move."""
    model = sized(dtype)
    base = digest(named_tensors(model.net))
    view, pool = view_of(model.net, law), K if law == noise.POOL else 1
    position = Position(law, pool, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    batches = rows(model)
    ids = [step // K << 32 | step % K for step in range(STEPS)]
    steps = descend(
        model,
        view,
        position,
        ids,
        [batches[i % 8] for i in range(STEPS)],
        get("loss"),
        eps=DRIFT_EPS,
        clip=0.0,
        to_units=lambda step, g: round(-LR * g / GRID),
    )
    assert steps.skipped == 0
    assert digest(named_tensors(model.net)) == base
    position.place(view)
    here = {name: t.clone() for name, t in view.tensors()}

    tensors = tuple((n, tuple(t.shape), str(t.dtype)[6:]) for n, t in named_tensors(model.net))
    head = LedgerHead(base, "", tensors, KEY, law, pool, GRID)
    Ledger(head).append(np.array(ids, np.uint64), steps.coefficients, 1).save(path)
    ledger = ledgers.load(path)
    assert len(ledger) > STEPS // 2
    other = sized(dtype)
    entries = list(zip(ledger.ids.tolist(), ledger.coefficients.tolist(), strict=True))
    replayed = dict(reference(named_tensors(other.net), law, entries))
    assert digest(sorted(here.items())) == digest(sorted(replayed.items()))
    assert digest(sorted(here.items())) != base
    apart = rms(here[n].double() - replayed[n].double() for n in here)
    return apart / rms(here[n].double() - t.double() for n, t in named_tensors(other.net))


@pytest.mark.parametrize(
    ("dtype", "law"),
    [
        ("fp16", "hashed"),
        pytest.param("bf16", "hashed", marks=pytest.mark.slow),
        pytest.param("bf16", "rademacher", marks=pytest.mark.slow),
    ],
)
def test_two_hundred_steps_end_where_their_ledger_does(dtype, law, tmp_path):
    assert our_way(dtype, law, tmp_path / "ledger.safetensors") == 0.0


@pytest.mark.parametrize("chunk", [views.CHUNK, 64])
@pytest.mark.parametrize("paired", [0, 1])
def test_a_row_of_a_table_is_that_of_the_moved_weights(
    chunk: int, paired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that fits into the scratch is made at once where many of its rows are used, a larger one by rows."""
    tokens = torch.arange(0, 264, 8).repeat(2).view(2, -1)
    net = llama(tied=False)
    view = View(named_tensors(net), net, run_key=KEY, law="hashed", grid=GRID)
    slot = next(s for s in view.slots if s.name.endswith("embed_tokens.weight"))
    view.place(passes("hashed", K, IDS, COEFFICIENTS))
    monkeypatch.setattr(views, "CHUNK", chunk)
    expected = []
    for sign in (1, -1)[: 1 + paired]:
        view.probe(probe("hashed", K, DIRECTION), sign * EPS)
        expected.append(view.whole(slot))
    view.probe(probe("hashed", K, DIRECTION), EPS)
    view.paired = paired
    numbers, table, where = view.table(slot, tokens)
    assert numbers == list(range(0, 264, 8))
    for found, whole in zip(table, expected, strict=True):
        assert torch.equal(found[where], whole[tokens])
    view.paired = 0
    view.remove()
