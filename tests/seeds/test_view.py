"""The view: what a net computes, forward and back, is what it would compute with the weights written, and nothing is."""

import copy
import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
import view_harness
from torch import Tensor, nn
from view_harness import ENTRIES, EPS, KEY, NETS, K, logits, make, placed, reference, view_of, written

from fleetune.data import Batch, Encoded, collate
from fleetune.data.encode import MASKED
from fleetune.errors import ModelError
from fleetune.evaluation import head_loss
from fleetune.evaluation.losses import batch_loss, token_losses
from fleetune.models import DTYPES, Model, digest, named_tensors, tiny_llama
from fleetune.models.net.layers import by_layer
from fleetune.seeds import descent, weights
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.descent import Position, descend, slope, two_point
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.seeds.noise import LAWS, POOL, passes, probe
from fleetune.seeds.view import Tape, Unpaired, View, _embedding
from fleetune.seeds.weights import WeightSlot, read_stored
from tiny_families import DECODERS, ENCODERS, build, model_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(NETS))
def test_logits_are_those_of_written_weights_bit_for_bit(name, dtype):
    # The tensors are small enough to be multiplied whole, so that even the order of the sums is the same.
    net, other = make(name, dtype), make(name, dtype)
    stored = digest(named_tensors(net))
    view = placed(view_of(net))
    for eps in (0.0, EPS, -EPS):
        view.probe(probe("hashed", K, view_harness.DIRECTION) if eps else None, eps)
        want = reference(named_tensors(net), "hashed", ENTRIES, eps)
        assert torch.equal(logits(net), logits(written(other, want))), eps
        assert not torch.equal(logits(net), logits(make(name, dtype)))
    assert digest(named_tensors(net)) == stored
    view.place(None)
    view.probe(None)
    assert torch.equal(logits(net), logits(make(name, dtype)))


@pytest.mark.parametrize("name", ["untied llama", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 5000])
def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch, name, chunk):
    # A product of fewer rows may sum in another order: equal up to some roundings of the type, not bit for bit.
    net, other = make(name), make(name)
    monkeypatch.setattr(weights, "CHUNK", chunk)
    placed(view_of(net), EPS)
    want = logits(written(other, reference(named_tensors(net), "hashed", ENTRIES, EPS)))
    noise = 16 * torch.finfo(torch.float32).eps * float(want.abs().max())
    assert float((logits(net) - want).abs().max()) <= noise
    moved = float((logits(make(name)) - want).abs().max())
    assert moved > 2 * noise  # the point is elsewhere, so a view that did nothing would show


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_other_laws(law):
    net, other = make("tied llama"), make("tied llama")
    placed(view_of(net, law), EPS)
    want = logits(written(other, reference(named_tensors(net), law, ENTRIES, EPS)))
    if law == "rademacher":
        assert torch.equal(logits(net), want)
    else:  # in floats, so equality is up to rounding
        torch.testing.assert_close(logits(net), want, rtol=1e-4, atol=1e-4)
    assert float((logits(net) - logits(make("tied llama"))).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_stored_weights_never_change_not_even_when_a_layer_fails(monkeypatch, name):
    class Boom(Exception):
        """An error of the test's own."""

    net, failing = make(name, "bf16"), list[Any]()
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


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_write_makes_the_point_the_stored_weights(monkeypatch, dtype):
    monkeypatch.setattr(weights, "CHUNK", 1234)
    net = make("gpt2", dtype)
    want = digest(reference(named_tensors(net), "hashed", ENTRIES))
    view = placed(view_of(net))
    view.write()
    assert digest(named_tensors(net)) == want
    assert digest(view.tensors()) == want  # and it is not moved twice
    assert net.lm_head.weight is net.transformer.wte.weight


def test_tensors_that_no_forward_asks_for_are_told(caplog):
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).requires_grad_(False)
    view = View(list(net.named_parameters()), net, run_key=KEY, law="rademacher", grid=EPS)
    net["used"](torch.zeros(1, 3))
    with caplog.at_level(logging.WARNING):
        view.warn_unreached()
    assert "idle.bias" in caplog.text
    caplog.clear()
    view.remove()
    View(list(net.named_parameters()), net, run_key=KEY, law="rademacher", grid=EPS).warn_unreached()
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
    view = placed(View(list(net.named_parameters()), net, run_key=KEY, law="hashed", grid=1e-5))
    moved, x = dict(view.tensors()), torch.ones(1, 3)
    assert torch.equal(net(x), x @ moved["inner.weight"].T + moved["inner.bias"])
    assert not torch.equal(net(x), x @ net.inner.weight.T + net.inner.bias)  # nobody runs: what is stored
    assert net.inner.weight is view.slots[1].tensor
    heard: dict[int, Tensor] = {}
    with Tape(view, heard.__setitem__), torch.enable_grad():
        net(x).sum().backward()
    slots = {slot.name: slot.start for slot in view.slots}
    assert torch.equal(heard[slots["inner.weight"]], torch.ones(2, 3))
    assert torch.equal(heard[slots["inner.bias"]], torch.ones(2))
    view.remove()
    assert type(net.inner._parameters) is dict
    assert not {"forward"} & (net.__dict__.keys() | net.inner.__dict__.keys())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    reads: list[tuple[str, int, int]] = []

    def read(slot: WeightSlot, first: int, last: int) -> Tensor:
        reads.append((slot.name, first, last))
        return read_stored(slot, first, last)

    monkeypatch.setattr(weights, "read_stored", read)
    return reads


def test_only_the_embedding_rows_in_use_are_read(asked):
    net = make("untied llama")
    placed(view_of(net), EPS)
    logits(net, torch.tensor([[7, 263, 7, 0]]))
    rows = [(a, b) for name, a, b in asked if name == "model.embed_tokens.weight"]
    assert rows == [(r * 32, (r + 1) * 32) for r in (0, 7, 263)]


def rows(count: int = 3) -> Batch:
    return collate([Encoded(np.arange(5 + i, 17 + 2 * i, dtype=np.int32), 4) for i in range(count)], 0, "cpu")


def square() -> Batch:
    """As many tokens a row as both signs have rows."""
    return collate([Encoded(np.arange(6, dtype=np.int32), 2) for _ in range(3)], 0, "cpu")


def moved_view(model: Model, law: str = "hashed", many: int = 1) -> View:
    view = View(named_tensors(model.net), model.net, run_key=KEY, law=law, grid=1e-5)
    ids = np.arange(many, dtype=np.uint64) << np.uint64(32)
    view.place(passes(law, 16 if law == "hashed" else 1, ids, np.arange(1, many + 1, dtype=np.int64)))
    return view


def both_ways(model: Model, view: View, batch: Batch) -> tuple[Any, Any]:
    direction = probe(view.law, 16 if view.law == "hashed" else 1, 7)
    one = descent._in_one_forward(model, view, direction, batch, EPS)
    return one, two_point(view, direction, EPS, functools.partial(batch_loss, model, batch))


def slope_of(model: Model, view: View, batch: Batch, objective: Any = batch_loss) -> tuple[float, float]:
    return slope(model, view, probe("hashed", 16, 7), batch, objective, eps=EPS, clip=0.0)


BELOW = [("rademacher", "bf16", 20), ("hashed", "fp16", 1), ("hashed", "bf16", 20)]


@pytest.mark.parametrize(
    ("law", "dtype", "many"), [*((law, "fp32", many) for law in LAWS for many in (0, 3)), *BELOW]
)
def test_both_signs_in_one_forward_have_the_losses_of_two(law, dtype, many):
    model = tiny_llama(seed=2)
    model.net.to(DTYPES[dtype])
    one, two = both_ways(model, moved_view(model, law, many), rows())
    assert one == two
    assert one[0] != one[1]


PAIRED = ["gpt2", "qwen3", "gemma3_text", "gpt_neox", "falcon"]
# experts get rows of their own choice; a mixer reads its convolution's weights; a head with a bias; positions by a mask
APART = ["gpt_oss", "mamba", "phi", "opt"]


@pytest.mark.parametrize("family", [*PAIRED, *APART])
def test_any_family_has_the_losses_of_two_forwards(family):
    model = model_of(build(family).requires_grad_(False), tiny_llama().tokenizer, family)
    view, batch = moved_view(model), rows()
    one, two = both_ways(model, view, batch)
    assert one == (two if family in PAIRED else None)
    expected = ((two[0] - two[1]) / (2 * EPS), (two[0] + two[1]) / 2)
    assert slope_of(model, view, batch) == expected
    assert descent._can_pair(view, batch, batch_loss) == (family in PAIRED)
    assert slope_of(model, view, batch) == expected


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_every_weight_is_read_once_for_both_signs(chunk, monkeypatch, asked):
    monkeypatch.setattr(weights, "CHUNK", chunk)
    model = tiny_llama()
    view = moved_view(model)
    descent._in_one_forward(model, view, probe("hashed", 16, 7), rows(), EPS)
    sizes = {s.name: s.tensor.numel() for s in view.slots}
    used, config = len(rows().input_ids.unique()), model.net.config
    at_once = config.vocab_size <= min(chunk // config.hidden_size, weights.CALL * used)
    sizes["lm_head.weight"] += (config.vocab_size if at_once else used) * config.hidden_size  # a tied table
    seen = {name: sum(b - a for n, a, b in asked if n == name) for name in sizes}
    assert seen == sizes


def test_it_is_taken_where_the_batch_is_small_and_the_objective_is_the_loss(monkeypatch):
    model, batch, forwards = tiny_llama(), rows(), list[int]()
    view = moved_view(model)
    model.net.model.register_forward_pre_hook(lambda *args: forwards.append(1))

    def count(objective: Any = batch_loss) -> int:
        forwards.clear()
        slope_of(model, view, batch, objective)
        return len(forwards)

    assert count() == 3  # a net's first step is taken both ways
    assert count() == 1
    assert count(lambda model, batch: batch_loss(model, batch)) == 2
    with view.storing():
        assert count() == 2
    monkeypatch.setattr(descent, "PAIRED", batch.labels.numel() - 1)
    assert count() == 2
    monkeypatch.setattr(descent, "PAIRED", 10**6)
    # 6 x 3: which are the rows?
    batch = square()
    assert count() == 2


class TokensFirst(nn.Module):
    """An MLP that is run on [tokens, rows, width]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_a_net_whose_first_step_differs_runs_each_sign_alone(monkeypatch):
    model, batch = tiny_llama(), rows()
    view = moved_view(model)
    two = both_ways(model, view, batch)[1]
    monkeypatch.setattr(descent, "_in_one_forward", lambda *args: (two[0], two[1] + 1e-6))
    expected = ((two[0] - two[1]) / (2 * EPS), (two[0] + two[1]) / 2)
    assert [slope_of(model, view, batch) for _ in range(2)] == [expected] * 2


def test_rows_that_are_not_first_are_refused_or_not_paired():
    model = tiny_llama()
    for layer in model.net.model.layers:
        layer.mlp = TokensFirst(layer.mlp)
    view = moved_view(model)
    assert both_ways(model, view, rows())[0] is None
    one, two = both_ways(model, view, square())
    assert one != two  # it could not be told
    assert not descent._can_pair(view, square(), batch_loss)


def test_a_view_is_as_before_after_it_failed():
    model, batch = tiny_llama(), rows()
    view = moved_view(model)
    before = batch_loss(model, batch)
    bad = batch._replace(input_ids=batch.input_ids + 10**6)
    with pytest.raises((IndexError, ValueError)):
        descent._in_one_forward(model, view, probe("hashed", 16, 7), bad, EPS)
    assert (view.paired, view.direction) == (0, None)
    assert batch_loss(model, batch) == before


def test_rows_without_an_answer_have_no_slope():
    model, batch = tiny_llama(), rows()
    nothing = batch._replace(labels=torch.full_like(batch.labels, MASKED))
    assert np.isnan(slope_of(model, moved_view(model), nothing)).all()


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
def test_ids_of_other_rows_than_the_batchs_are_refused(shape):
    view = moved_view(tiny_llama())
    view.probe(probe("hashed", 16, 7), EPS)
    view.paired = 4
    slot = next(s for s in view.slots if s.tensor.dim() == 2)
    with pytest.raises(Unpaired):
        _embedding(view, slot, torch.zeros(shape, dtype=torch.int64))


def batch_for(net: nn.Module) -> Batch:
    """Two rows with padding, whose token also stands where it counts, as one that ends a turn does."""
    pad = int(net.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
    ids = torch.tensor([[5, 9, 20, 5, pad, 26, 2], [1, 4, 2, 3, 12, pad, pad]])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    if type(net).__name__.endswith("ForSequenceClassification"):
        return Batch(ids, mask, torch.tensor([1, 0]))
    labels = ids.masked_fill(mask == 0, MASKED)
    labels[:, :2] = MASKED
    return Batch(ids, mask, labels)


def by_tape(net: nn.Module, view: View, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of each tensor, put together from what the sink is handed, and the losses."""
    whole = {slot.name: torch.zeros(slot.tensor.numel()) for slot in view.slots}
    ends = {slot.name: (slot.start, slot.start + slot.tensor.numel()) for slot in view.slots}

    def sink(start: int, gradient: Tensor) -> None:
        assert gradient.is_contiguous()
        name = next(n for n, (a, b) in ends.items() if a <= start < b)
        first = start - ends[name][0]
        whole[name][first : first + gradient.numel()] += gradient.float().view(-1)

    with Tape(view, sink), by_layer(net, small=0), torch.enable_grad():
        losses, _ = token_losses(net, batch)
        losses.mean().backward()
    return whole, losses.detach()


def plain(net: nn.Module, view: View, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    moved = dict(view.tensors())
    view.remove()
    twin = written(copy.deepcopy(net), moved.items()).requires_grad_(True)
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    with torch.enable_grad():
        losses, _ = token_losses(twin, batch)
        losses.mean().backward()
    gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in named_tensors(twin)}
    return {n: g.reshape(-1) for n, g in gradients.items()}, losses.detach()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_the_gradients_are_those_of_a_net_that_holds_the_moved_weights(family, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 700)  # several blocks of rows a matrix
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 256)  # several pieces of rows a block
    net = build(family).eval().requires_grad_(False)
    batch = batch_for(net)
    view = View(named_tensors(net), net, run_key=KEY, law="hashed", grid=1e-5)
    c = np.random.default_rng(5).integers(-400, 400, 64)
    view.place(passes("hashed", 64, np.arange(64, dtype=np.uint64), c))
    gradients, loss = by_tape(net, view, batch)
    wanted, plain_loss = plain(net, view, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-4, atol=2e-5)
    size = max(float(g.abs().max()) for g in wanted.values())
    assert size > 1e-4
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=2e-5 * size)


def test_a_tape_leaves_no_trace_even_after_an_error():
    model = tiny_llama()
    view = moved_view(model)
    before = {n: (p, p.clone()) for n, p in model.net.named_parameters()}
    loss = batch_loss(model, rows())
    with pytest.raises(RuntimeError, match="stop"), Tape(view, lambda start, g: None), by_layer(model.net):
        assert token_losses(model.net, rows())[0].requires_grad
        raise RuntimeError("stop")
    after = dict(model.net.named_parameters())
    assert all(after[n] is p and torch.equal(p, old) for n, (p, old) in before.items())
    assert not token_losses(model.net, rows())[0].requires_grad
    assert batch_loss(model, rows()) == loss


@pytest.mark.parametrize(("dtype", "law"), [("fp16", "hashed"), ("bf16", "rademacher")])
def test_many_steps_end_where_their_ledger_does(dtype, law, tmp_path):
    steps, grid, pool = 60, 3e-6, K if law == POOL else 1
    model = tiny_llama(seed=1)
    model.net.to(DTYPES[dtype])
    stored = named_tensors(model.net)
    base = digest(stored)
    view = view_of(model.net, law)
    position = Position(law, pool, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    ids = [step // K << 32 | step % K for step in range(steps)]
    how: Any = {"eps": 1e-3, "clip": 0.0, "to_units": lambda step, g: round(-1e-6 * g / grid)}
    taken = descend(model, view, position, ids, [rows()] * steps, batch_loss, **how)
    assert taken.skipped == 0
    assert digest(stored) == base
    position.place(view)
    tensors = tuple((n, tuple(t.shape), str(t.dtype)[6:]) for n, t in stored)
    head = LedgerHead(base, "", tensors, KEY, law, pool, view.grid)
    Ledger(head).append(np.array(ids, np.uint64), taken.coefficients, 1).save(tmp_path / "l")
    ledger = ledgers.load(tmp_path / "l")
    assert len(ledger) > steps // 2
    entries = list(zip(ledger.ids.tolist(), ledger.coefficients.tolist(), strict=True))
    assert digest(view.tensors()) == digest(reference(stored, law, entries)) != base
