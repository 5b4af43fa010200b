"""Weights at a point, a piece at a time: those of the definition, whatever kernels, threads and pieces make them."""

import sys

import numpy as np
import pytest
import torch
import view_harness
from view_harness import DIRECTION, ENTRIES, EPS, K, llama, logits, make, placed, reference, view_of

from command_line import refused
from fleetune import seeds
from fleetune.common.hearing import hearing
from fleetune.errors import UsageError
from fleetune.models import DTYPES, digest, named_tensors, tiny_llama
from fleetune.seeds import weights
from fleetune.seeds.descent import two_point
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.weights import MovedWeights, kernels, layout

CPU, META = torch.device("cpu"), torch.device("meta")
GOLDEN = "eda21ad7ba134ea1da5645fee7af938bbcbe1551ef97d9036579fb8e801e1052"


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", ["tied llama", "gpt2"])
def test_tensors_are_the_definition(monkeypatch, name, dtype, law):
    net = make(name, dtype)
    want = digest(reference(named_tensors(net), law, ENTRIES))
    assert want != digest(named_tensors(net))
    for chunk, backend, threads in ((1 << 20, "numba", 1), (777, "numba", 2), (4096, "torch", 1)):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        view = view_of(net, law)
        view.kernels, view.threads = kernels(CPU, backend), threads
        assert digest(placed(view).tensors()) == want
        order = np.array([2, 0, 3, 1])
        view.place(passes(law, K, view_harness.IDS[order], view_harness.COEFFICIENTS[order]))
        assert digest(view.tensors()) == want
        view.remove()


def test_a_rebuilt_model_never_changes():
    model = tiny_llama()
    assert digest(placed(view_of(model.net)).tensors()) == GOLDEN
    assert model.digest == digest(named_tensors(model.net))


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_two_points_are_w_plus_and_minus_eps_z_exactly(dtype, law):
    net = make("tied llama", dtype)
    view, seen = placed(view_of(net, law)), list[str]()

    def loss() -> float:
        seen.append(digest(view.tensors()))
        return 0.0

    two_point(view, probe(law, K, DIRECTION), EPS, loss)
    named = named_tensors(net)
    assert seen == [digest(reference(named, law, ENTRIES, e)) for e in (EPS, -EPS)]
    assert digest(view.tensors()) == digest(reference(named, law, ENTRIES))


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


def test_scratch_is_bounded(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 1000)
    net, sizes, sweep = make("tied llama"), list[int](), MovedWeights.sweep

    def watched(view: MovedWeights, out: torch.Tensor, *rest: object, **more: object) -> None:
        sizes.append(out.numel())
        sweep(view, out, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(MovedWeights, "sweep", watched)
    view = placed(view_of(net), EPS)
    logits(net)
    list(view.tensors())
    assert max(sizes) <= 1000
    assert view._scratch.numel() <= 1000


@pytest.mark.parametrize("chunk", [weights.CHUNK, 64])
@pytest.mark.parametrize("paired", [0, 1])
def test_a_row_of_a_table_is_that_of_the_moved_weights(chunk, paired, monkeypatch):
    """A table that fits into the scratch is made at once where many of its rows are used, a larger one by rows."""
    tokens = torch.arange(0, 264, 8).repeat(2).view(2, -1)
    view = placed(view_of(llama(tied=False)))
    slot = next(s for s in view.slots if s.name.endswith("embed_tokens.weight"))
    monkeypatch.setattr(weights, "CHUNK", chunk)
    expected = []
    for sign in (1, -1)[: 1 + paired]:
        view.probe(probe("hashed", K, DIRECTION), sign * EPS)
        expected.append(view.whole(slot))
    view.probe(probe("hashed", K, DIRECTION), EPS)
    view.paired = paired
    numbers, table, where = view.table(slot, tokens)
    assert numbers == list(range(0, 264, 8))
    for part, whole in zip(table, expected, strict=True):
        assert torch.equal(part[where], whole[tokens])


def test_a_stored_direction_is_that_of_the_law():
    net = make("gpt2")
    view = placed(view_of(net))
    with view.storing():
        view.probe(probe("hashed", K, DIRECTION), EPS)
        for slot in view.slots:
            z = view_harness.direction("hashed", DIRECTION, slot.start, slot.tensor.numel())
            assert np.array_equal(view.stored.z[slot.name].numpy(), z)
        assert digest(view.tensors()) == digest(reference(named_tensors(net), "hashed", ENTRIES, EPS))


def moved_far(law: str, count: int) -> MovedWeights:
    view = view_of(tiny_llama().net, law)
    view.place(passes(law, 1, np.arange(count, dtype=np.uint64), np.arange(1, count + 1)))
    return view


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_many_passes_are_made_in_pieces_that_hear_a_stop(monkeypatch, law):
    view, count, heard = moved_far(law, 5), 5, list[int]()
    slot = max(view.slots, key=lambda slot: slot.tensor.numel())
    size = slot.tensor.numel()
    pieces = -(-size // 4096)
    assert pieces > 1
    view.probe(probe(law, 1, 5), EPS)
    plus = view.piece(slot, 0, size).clone()
    view.probe(probe(law, 1, 5), -EPS)
    minus = view.piece(slot, 0, size).clone()
    monkeypatch.setattr(weights, "WORK", count * 4096)
    with hearing(lambda: heard.append(1)):
        assert torch.equal(view.piece(slot, 0, size), minus)
        assert len(heard) == pieces
        view.probe(probe(law, 1, 5), EPS)
        view.paired = 1  # both signs in one forward
        assert all(map(torch.equal, view.signs(slot, 0, size), (plus, minus)))
    assert len(heard) == 2 * pieces


def test_a_limit_is_of_passes_over_all_weights():
    view = moved_far("gaussian", 5)
    view.limit(2 * 5)
    for _ in range(2):
        digest(view.tensors())
    with pytest.raises(UsageError, match="more passes over the weights"):
        digest(view.tensors())
    view.limit(0)
    digest(view.tensors())


@pytest.mark.parametrize(
    ("word", "asked", "device", "want"),
    [
        (None, "auto", CPU, "numba"),
        ("", "auto", CPU, "numba"),
        ("torch", "auto", CPU, "torch"),
        ("torch", "numba", CPU, "numba"),  # what a caller asks for goes before the environment
        ("numba", "torch", CPU, "torch"),
        (None, "auto", META, "torch"),
        ("auto", "auto", META, "torch"),
    ],
)
def test_the_environment_chooses(monkeypatch, word, asked, device, want):
    monkeypatch.delenv(seeds.VARIABLE, raising=False)
    if word is not None:
        monkeypatch.setenv(seeds.VARIABLE, word)
    assert kernels(device, asked).__name__ == f"fleetune.seeds.kernels_{want}"


def test_numba_where_it_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv(seeds.VARIABLE, "numba")
    with pytest.raises(UsageError, match="on meta"):
        kernels(META)
    monkeypatch.setitem(sys.modules, "fleetune.seeds.kernels_numba", None)  # as if Numba were not there
    with pytest.raises(UsageError, match="not usable here"):
        kernels(CPU)
    monkeypatch.setenv(seeds.VARIABLE, "auto")
    assert kernels(CPU).__name__ == "fleetune.seeds.kernels_torch"


def test_another_word_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setenv(seeds.VARIABLE, "moon")
    assert "moon" in refused(capsys, "tune", "no such model", "no such data")
