"""The digest of a model and of a tokenizer, drawn values, and the tiny models."""

import dataclasses
import hashlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetune import adapters, models
from fleetune.common.hearing import hearing
from fleetune.models.net import model as weights


def by_hand(name: str, kind: str, shape: str, raw: bytes) -> bytes:
    return name.encode() + b"\0" + kind.encode() + b"\0" + shape.encode() + b"\0" + raw


def test_digest_is_the_stated_bytes() -> None:
    tensors = [
        ("a", torch.tensor([[1.0, -2.0], [0.5, 3.0]])),
        ("b", torch.tensor([1.0, 2.0], dtype=torch.bfloat16)),
        ("c", torch.tensor(7.0, dtype=torch.float16)),
        ("d", torch.empty(0, 3)),
    ]
    expected = hashlib.sha256(
        by_hand("a", "float32", "2,2", np.array([1, -2, 0.5, 3], "<f4").tobytes())
        + by_hand("b", "bfloat16", "2", b"\x80\x3f\x00\x40")
        + by_hand("c", "float16", "", np.array(7, "<f2").tobytes())
        + by_hand("d", "float32", "0,3", b"")
    ).hexdigest()
    assert models.digest(tensors) == expected
    assert models.digest(iter(tensors)) == expected


def test_digest_feels_name_dtype_shape_and_every_bit() -> None:
    x = torch.arange(6, dtype=torch.float32)
    flipped = x.clone()
    flipped.view(torch.int32)[5] ^= 1
    others = (x, x.view(torch.int32), x.view(2, 3), x.view(3, 2), flipped)
    seen = {models.digest([("a", tensor)]) for tensor in others}
    seen |= {models.digest([("b", x)]), models.digest([("a", x[:3]), ("b", x[3:])])}
    assert len(seen) == 7


def test_digest_wants_name_order() -> None:
    x = torch.zeros(1)
    for names in (("b", "a"), ("a", "a")):
        with pytest.raises(ValueError, match="name order"):
            models.digest([(n, x) for n in names])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 200), st.booleans())
@example([1, 2], 1, True)
def test_digest_does_not_depend_on_pieces_or_strides(shape: list[int], chunk: int, transposed: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(len(shape)).random(shape, np.float32))
    x = x.transpose(0, -1) if transposed else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK", chunk)
        pieces = models.digest([("x", x)])
    raw = x.numpy().astype("<f4").tobytes()
    assert pieces == hashlib.sha256(by_hand("x", "float32", ",".join(map(str, x.shape)), raw)).hexdigest()


def test_tied_tensors_count_once_under_their_first_name() -> None:
    tiny = models.tiny_llama()
    names = [name for name, _ in models.named_tensors(tiny.net)]
    assert names == sorted(names)
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    assert sum(t.numel() for _, t in models.named_tensors(tiny.net)) == tiny.n_params == 28_576


def test_tokenizer_digest_keeps_to_what_matters() -> None:
    one, two = models.tiny_tokenizer(), models.tiny_tokenizer()
    first = models.tokenizer_digest(one)
    one(["a", "bcd"], padding=True, truncation=True, max_length=3)  # leaves padding state in the backend
    assert models.tokenizer_digest(one) == first == models.tokenizer_digest(two)
    two.chat_template += " "
    assert models.tokenizer_digest(two) != first


def test_tiny_llama_is_the_same_everywhere_and_leaves_global_generators_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    tiny = models.tiny_llama()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert tiny.digest == "ecd23d1e9bfa594d115aba80e2bd1c24124859602afea88e7fb6a3eb25fd5cf2"
    assert tiny.digest == models.tiny_llama(0).digest != models.tiny_llama(1).digest
    assert not tiny.net.training
    assert not any(p.requires_grad for p in tiny.net.parameters())


def test_uniform_is_pinned() -> None:
    values = models.uniform("key", (2, 2), 1.0)
    word = int.from_bytes(hashlib.sha256(b"key").digest()[:16], "little")
    raw = np.random.Philox(key=word).random_raw(4)
    assert np.array_equal(values.reshape(-1), [(int(w) >> 40) / 2**23 - 1 for w in raw])
    wide = models.uniform("other", (20_000,), 0.5)
    assert -0.5 <= wide.min() < -0.499
    assert 0.499 < wide.max() < 0.5
    assert abs(wide.mean()) < 0.01


def test_each_block_is_heard_of_before_it_runs_once() -> None:
    model, heard = models.tiny_llama(layers=3), list[str]()
    again = dataclasses.replace(model, name="the same net")
    adapters.attach(again, adapters.Lora(2, 4), seed=1)
    ids = torch.tensor([[1, 2, 3]])
    with hearing(lambda: heard.append("outer")):
        with hearing(lambda: heard.append("inner")):
            again.net(input_ids=ids)
        heard.append("-")
        again.net(input_ids=ids)
        other = threading.Thread(target=lambda: again.net(input_ids=ids))  # another thread's work is its own
        other.start()
        other.join()
    again.net(input_ids=ids)
    inner, outer = " ".join(heard).split("-")
    assert 3 <= inner.count("inner") == outer.count("outer") <= 4
    assert "outer" not in inner
