"""Our files in llama.cpp itself, where it is installed: the same losses and the same continuation as in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny

from fleetune.common.display import pip_install
from fleetune.data import Encoded
from fleetune.deploy import export, harness, llamacpp
from fleetune.errors import ModelError, UsageError
from fleetune.evaluation.losses import response_loss
from fleetune.models import Model

needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A compressed model as the artefact holds it, and its file in fp32."""
    folder, model = tmp_path_factory.mktemp("made"), tiny()
    compressed(model, folder / "model")
    export.write(folder / "model", "gguf:f32", folder / "a.gguf")
    return model, folder / "a.gguf"


def rows() -> list[tuple[list[int], int]]:
    """Shorter and longer than what is scored and read at once."""
    rng = np.random.default_rng(1)
    sizes = ((7, 3), (2, 1), (150, 20), (700, 0), (700, 690))
    return [(rng.integers(0, 260, n).tolist(), k) for n, k in sizes]


@needs_engine
def test_losses_are_torch_s(made: tuple[Model, Path]) -> None:
    model, file = made
    with llamacpp.opened(file, 1) as engine:
        assert engine.vocab == 264
        whole = harness.mean(engine.losses(rows()))
        parts = [harness.mean(engine.losses([row])) for row in rows()]
    ours = [response_loss(model, [Encoded(np.asarray(ids, np.int32), k)]) for ids, k in rows()]
    assert parts == pytest.approx(ours, rel=1e-3)  # its cache of keys and values is fp16
    counts = [len(ids) - max(k, 1) for ids, k in rows()]
    assert whole == pytest.approx(np.average(parts, weights=counts), rel=1e-6)


@needs_engine
def test_logits_are_those_of_the_scored_tokens_piece_by_piece(made: tuple[Model, Path]) -> None:
    model, file = made
    with llamacpp.opened(file, 1) as engine:
        pieces = [piece.copy() for piece in engine.scored_logits(rows())]
        losses = engine.losses(rows())
    assert max(map(len, pieces)) == llamacpp.SCORED
    found = np.concatenate(pieces)
    assert len(found) == sum(count for _, count in losses)
    with torch.inference_mode():
        own = [model.net(input_ids=torch.tensor([ids])).logits[0, max(k, 1) - 1 : -1] for ids, k in rows()]
    np.testing.assert_allclose(found, torch.cat(own).numpy(), atol=0.01 * float(torch.cat(own).abs().max()))
    targets = np.concatenate([ids[max(k, 1) :] for ids, k in rows()])
    exact = found.astype(np.float64)
    nll = np.log(np.exp(exact).sum(1)) - exact[np.arange(len(targets)), targets]
    assert nll.sum() == pytest.approx(sum(loss for loss, _ in losses), rel=1e-9)


@needs_engine
def test_steps_write_torch_s_greedy_continuation(made: tuple[Model, Path]) -> None:
    model, file = made
    prompt = np.random.default_rng(2).integers(0, 260, 600).tolist()  # longer than one batch
    with llamacpp.opened(file, 1) as engine:
        for ids in ([5, 6], prompt):  # the second forgets the first
            engine.open(700)
            engine.prefill(ids)
            seen = list(ids)
            for _ in range(5):
                logits = engine._rows(engine._lib.llama_get_logits_ith(engine._context, -1), 1)[0].copy()
                with torch.inference_mode():
                    ours = model.net(input_ids=torch.tensor([seen])).logits[0, -1].numpy()
                assert np.abs(logits - ours).max() < 0.01 * np.abs(ours).max()
                seen.append(int(logits.argmax()))
                engine.step()


@needs_engine
def test_a_bad_file_and_a_row_beyond_the_room_are_refused(made: tuple[Model, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="does not load"):
        llamacpp.LlamaCpp(tmp_path / "bad.gguf", 1)
    with llamacpp.opened(made[1], 1) as engine:
        engine.open(16)
        with pytest.raises(ModelError, match="room for 16 tokens, not for 260"):
            engine.prefill(list(range(260)))
    engine.close()  # a second time is nothing


def test_without_the_engine_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llamacpp, "MODULE", "no_such_engine")
    assert not llamacpp.available()
    with pytest.raises(UsageError, match="not installed") as told:
        llamacpp.LlamaCpp(tmp_path / "a.gguf", 1)
    assert told.value.hint == pip_install("llamacpp")
