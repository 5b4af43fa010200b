"""KL divergence and same top token against the formulas, in float64 and a token at a time; the file between the two models."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import Patch
from fleetune.data.encode import Encoded
from fleetune.errors import StorageError
from fleetune.evaluation import kl_divergence, losses
from fleetune.evaluation.kl_divergence import compare, of_tokens, positions, scored, summary, write
from fleetune.models import Model, tiny_llama

FULL = Path("/dev/full")


def drawn(seed: int, n: int = 7, V: int = 50, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((n, V))).astype(np.float32)


def by_hand(P: np.ndarray, Q: np.ndarray) -> list[float]:
    """The formula, a token and a word at a time; sums without rounding."""
    found = []
    for p, q in zip(P.astype(np.float64).tolist(), Q.astype(np.float64).tolist(), strict=True):
        log_p, log_q = ([x - math.log(math.fsum(map(math.exp, row))) for x in row] for row in (p, q))
        found.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
    return found


@pytest.mark.parametrize("piece", [1, 8 * 50, 1 << 22])
def test_the_divergence_of_a_token_is_the_formula(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_divergence, "PIECE", piece)
    P, Q = drawn(0), drawn(1)
    kl, same = of_tokens(P, Q)
    assert kl.dtype == np.float64
    np.testing.assert_allclose(kl, by_hand(P, Q), rtol=1e-13)
    pairs = zip(P.tolist(), Q.tolist(), strict=True)
    assert same.tolist() == [a.index(max(a)) == b.index(max(b)) for a, b in pairs]
    assert np.array_equal(of_tokens(P, P)[0], np.zeros(7))
    for a, b in ((P, drawn(1, V=60)), (drawn(1, V=60), P)):  # of two widths the smaller counts
        np.testing.assert_allclose(of_tokens(a, b)[0], by_hand(a[:, :50], b[:, :50]), rtol=1e-13)
    assert of_tokens(P, P)[1].all()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6), st.integers(0, 99))
def test_it_is_never_below_0_and_an_added_constant_changes_nothing(logits: list[float], seed: int) -> None:
    P, Q = np.array([logits], np.float32), drawn(seed, 1, len(logits))
    kl = of_tokens(P, Q)[0][0]
    assert kl >= -1e-12
    assert of_tokens(P.astype(np.float64) + 64, Q)[0][0] == pytest.approx(kl, rel=1e-9, abs=1e-9)


def test_words_that_cannot_come_count_nothing_and_a_model_that_excludes_a_word_is_infinitely_far() -> None:
    P, Q = drawn(0, 1, 4), drawn(1, 1, 4)
    P[0, 3] = Q[0, 3] = -np.inf
    np.testing.assert_allclose(of_tokens(P, Q)[0], by_hand(P[:, :3], Q[:, :3]), rtol=1e-13)
    Q[0, 1] = -np.inf
    assert of_tokens(P, Q)[0][0] == np.inf
    P[0, 0] = np.nan
    assert np.isnan(of_tokens(P, Q)[0][0])


def test_means_and_standard_errors_are_over_the_tokens() -> None:
    kl, same = np.array([0.5, 0.25, 1.0, 0.125]), np.array([True, False, True, True])
    found = summary(kl, same)
    assert found.kl_divergence == statistics.fmean(kl)
    assert found.kl_divergence_error == pytest.approx(statistics.stdev(kl.tolist()) / 2, rel=1e-12)
    assert found.same_top == 75.0
    assert found.same_top_error == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3), rel=1e-12)
    assert found.kl_tokens == 4
    one = summary(kl[:1], same[:1])
    assert one.values() == {"kl_divergence": 0.5, "same_top": 100.0, "kl_tokens": 1}


def cut(logits: np.ndarray, *sizes: int) -> Iterator[np.ndarray]:
    yield from np.split(logits, np.cumsum(sizes))


@pytest.mark.parametrize("writes", [(7,), (1, 2, 3), (3, 3)])
@pytest.mark.parametrize("reads", [(7,), (2, 4), (1, 1, 1)])
def test_pieces_of_any_size_give_the_same_bits(writes: tuple, reads: tuple, tmp_path: Path) -> None:
    P, Q = drawn(0), drawn(1)
    assert write(tmp_path / "p", cut(P, *writes), 7) == kl_divergence.tokens_in(tmp_path / "p") == 7
    assert compare(tmp_path / "p", cut(Q, *reads)) == summary(*of_tokens(P, Q))


def test_only_the_first_tokens_are_kept_and_no_more_made(tmp_path: Path, monkeypatch: Patch) -> None:
    P, Q = drawn(0), drawn(1)

    def until(logits: np.ndarray) -> Iterator[np.ndarray]:
        yield from cut(logits[:6], 2, 2)
        raise AssertionError("a piece that is not needed")

    monkeypatch.setattr(kl_divergence, "ROOM", 4 * 50 * 5 + 199)
    assert positions(7, 50) == 5
    assert kl_divergence.file_size(7, 50) == 1000
    assert write(tmp_path / "p", until(P), 7) == 5
    assert 1000 < (tmp_path / "p").stat().st_size <= 1000 + 128
    assert compare(tmp_path / "p", until(Q)) == summary(*of_tokens(P[:5], Q[:5]))
    assert positions(7, 1 << 40) == 1


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said() -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        write(FULL, cut(drawn(0, V=5000), 7), 7)


def rows() -> list[Encoded]:
    draw = np.random.default_rng(0)
    sizes = ((9, 0), (12, 5), (4, 4), (1, 0), (30, 29))
    return [Encoded(draw.integers(0, 250, n).astype(np.int32), k) for n, k in sizes]


def whole(model: Model, row: Encoded) -> np.ndarray:
    """The logits of a row's scored tokens from one forward of all of it."""
    with torch.inference_mode():
        logits = model.net(input_ids=torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0]
    return logits[max(row.n_prompt, 1) - 1 : -1].float().numpy()


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_model_is_compared_by_tokens(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.evaluation.head_loss.CHUNK_BYTES", 4 * 264 * chunk)
    dense, model = tiny_llama(seed=3), tiny_llama(seed=4)
    assert scored((row.ids, row.n_prompt) for row in rows()) == 8 + 7 + 1
    P, Q = (np.concatenate([whole(m, row) for row in rows()]) for m in (dense, model))
    expected = by_hand(P, Q)
    assert max(map(len, losses.scored_logits(dense, rows()))) == min(chunk, 8)
    kept = losses.keep_logits(dense, rows(), tmp_path / "p")
    assert kept.tokens == len(expected) == 16
    found, loss = kept.compare(model)
    assert (kept.loss, loss) == pytest.approx(
        [losses.response_loss(m, rows(), batch_size=1) for m in (dense, model)], rel=1e-6
    )
    assert found.kl_divergence == pytest.approx(statistics.fmean(expected), rel=1e-5)
    assert found.kl_divergence_error == pytest.approx(statistics.stdev(expected) / 4, rel=1e-5)
    assert found.same_top == 100 * float((P.argmax(1) == Q.argmax(1)).mean())
    assert kept.compare(model) == (found, loss)
    itself, _ = kept.compare(dense)
    assert (itself.kl_divergence, itself.same_top) == (0.0, 100.0)


def test_a_caller_between_two_pieces_can_train() -> None:
    """No mode of torch is left on while the caller has a piece, nor afterwards."""
    model = tiny_llama(seed=3)
    model.net.train()
    for _ in losses.scored_logits(model, rows()):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert model.net.training
