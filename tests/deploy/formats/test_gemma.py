"""Gemma's decoders as .gguf: norms, caps, windows and rotary bases there and back, tokens of pieces, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import piece_tokenizer
from tokenizers import AddedToken, normalizers
from transformers import AutoConfig, PreTrainedTokenizerBase

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.models import Model
from tiny_families import drawn, sizes

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = torch.tensor([[1, *range(262, 287), *range(40, 70)]])  # longer than the windows
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def words() -> PreTrainedTokenizerBase:
    """Pieces as Gemma has them: no space in front of a text, runs of spaces and lines among the added words."""
    made = piece_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    made.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "<unused0>")])
    return made


def tiny(kind: str, **changes: Any) -> Model:
    layers = 7 if kind == "gemma3_text" else 2  # the sixth looks at everything
    given = sizes(64, 128, layers, 4, 2, vocab_size=288, head_dim=32, max_position_embeddings=1024)
    given |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if kind != "gemma":
        given |= {"query_pre_attn_scalar": 32, "sliding_window": 8}
    config = AutoConfig.for_model(kind, **given | changes)
    return drawn(config, words(), kind, 0, 0.2, lambda tensor: False, attn_implementation="eager")


def saved(model: Model, folder: Path) -> Path:
    models.save(model.net, model.tokenizer, folder)
    return folder


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {}),
    ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    ("gemma3_text", {}),
    ("gemma3_text", {"rope_parameters": LOCAL}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_file_loads_back_to_the_same_logits_and_tokens(tmp_path: Path, kind: str, changes: dict) -> None:
    model = tiny(kind, **changes)
    report = export(saved(model, tmp_path / "m"), "gguf:f32", tmp_path / "x.gguf")
    assert (report.exact, report.types, report.notes) == (report.tensors, {"F32": report.tensors}, ())
    back = models.load(str(report.path))
    back.net.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(back.net(IDS).logits, model.net(IDS).logits)
    want, found = model.net.config.to_dict(), back.net.config.to_dict()
    for key in want.keys() - {"transformers_version", "dtype", "_name_or_path", "architectures"}:
        assert found[key] == want[key], key
    for text in ("hello hell", "  hel lo\n\n\nx", "<unused0>hello\n\n", "é 🚀 xhello", "", " "):
        assert back.tokenizer(text).input_ids == model.tokenizer(text).input_ids, text
        texts = [m.tokenizer.decode(m.tokenizer(text).input_ids) for m in (back, model)]
        assert texts[0] == texts[1]
