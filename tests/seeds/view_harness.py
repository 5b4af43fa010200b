"""Small nets, a point and a probe, and the weights there by the definition."""

import copy
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

import law_definition
from fleetune.models import DTYPES, named_tensors, uniform
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import View

KEY, GRID, EPS, K = 0xFEEDFACE12345678, float(np.float32(3e-6)), 1e-2, 32
IDS = np.array([3, 17, 1 << 32 | 3, 5 << 32 | 31], np.uint64)
COEFFICIENTS = np.array([900, -1500, 400, 8193], np.int64)
ENTRIES = list(zip(IDS.tolist(), COEFFICIENTS.tolist(), strict=True))
DIRECTION = 5 << 32 | 7
direction = partial(law_definition.direction, K=K, key=KEY)
TOKENS = torch.tensor([[5, 9, 200, 5, 0, 263, 44], [1, 1, 2, 3, 120, 7, 8]])
IDENTIFIERS = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = IDENTIFIERS | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"max_position_embeddings": 128}
NETS: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: llama(tied=True),
    "untied llama": lambda: llama(tied=False),
    # Conv1D, LayerNorm with a bias, position embeddings, tied
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**IDENTIFIERS, n_positions=64, n_embd=24, n_layer=2, n_head=4)
    ),
    # linear layers with a bias, tied
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, intermediate_size=40, num_hidden_layers=1, tie_word_embeddings=True)
    ),
}
Named = Iterable[tuple[str, Tensor]]


def llama(*, tied: bool) -> Any:
    config = LlamaConfig(**SMALL, intermediate_size=72, num_hidden_layers=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


@cache
def _made(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        net = NETS[name]()
    for n, tensor in named_tensors(net):
        bound = 0.02 if "bias" in n else 0.15 if tensor.dim() == 2 else 1.0
        tensor.data.copy_(torch.from_numpy(uniform(n, tuple(tensor.shape), bound)))
    return net.eval().requires_grad_(False)


def make(name: str, dtype: str = "fp32") -> Any:
    """A net with weights that are a function of their names alone; every tensor, biases too, is random."""
    return copy.deepcopy(_made(name)).to(DTYPES[dtype])


def view_of(net: Any, law: str = "hashed") -> View:
    return View(named_tensors(net), net, run_key=KEY, law=law, grid=GRID)


def placed(view: View, eps: float = 0.0) -> View:
    view.place(passes(view.law, K, IDS, COEFFICIENTS))
    if eps:
        view.probe(probe(view.law, K, DIRECTION), eps)
    return view


def logits(net: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return net(input_ids=tokens).logits.clone()


def reference(named: Named, law: str, entries: Iterable[tuple[int, int]], eps: float = 0.0) -> Named:
    """round((w0 + grid * sum c z) + eps z'), each float32 operation by itself, rounded to the dtype once."""
    moved, start = [], 0
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        n = tensor.numel()
        w = tensor.detach().float().numpy().reshape(-1)
        acc = sum((c * direction(law, id, start, n) for id, c in entries), start=np.zeros(n, np.int64))
        w = w + np.float32(GRID) * acc.astype(np.float32)
        w = w + np.float32(eps) * direction(law, DIRECTION, start, n).astype(np.float32)
        assert w.dtype == np.float32
        moved.append((name, torch.from_numpy(w).to(tensor.dtype).view(tensor.shape)))
        start += -(-n // 4096) * 4096
    return moved


def written(net: Any, tensors: Named) -> Any:
    known = dict(named_tensors(net))
    for name, tensor in tensors:
        known[name].copy_(tensor)
    return net
