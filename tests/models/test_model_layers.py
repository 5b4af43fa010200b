"""Layers by their structure, and their activations computed again."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import family_matrix as families
from fleetune.errors import ModelError
from fleetune.models.net import layers as net_layers
from fleetune.models.net.layers import HEAP, body_of, by_layer, layers_of
from tiny_families import build

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
QUERY_VALUE = "attention.self.query_proj attention.self.value_proj"
# family: what makes queries and values, what writes to the residual stream (within the second layer), heads of keys
PLACES = {
    "llama": ("self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp.down_proj", 2),
    "phi": ("self_attn.q_proj self_attn.v_proj", "self_attn.dense mlp.fc2", 4),
    "phi3": ("self_attn.qkv_proj self_attn.qkv_proj", "self_attn.o_proj mlp.down_proj", 2),
    "gpt2": ("attn.c_attn attn.c_attn", "attn.c_proj mlp.c_proj", 4),
    "gpt_neox": ("attention.query_key_value", "attention.dense mlp.dense_4h_to_h", 4),
    "gptj": ("attn.q_proj attn.v_proj", "attn.out_proj mlp.fc_out", 4),
    "opt": ("self_attn.q_proj self_attn.v_proj", "self_attn.out_proj fc2", 4),
    "falcon": ("self_attention.query_key_value", "self_attention.dense mlp.dense_4h_to_h", 1),
    "gpt_oss": ("self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp", 2),
    "lfm2": ("self_attn.q_proj self_attn.v_proj", "self_attn.out_proj feed_forward.w2", 2),
    "mamba": (" ", "mixer", 0),
    "bert": ("attention.self.query attention.self.value", "attention.output.dense output.dense", 4),
    "modernbert": ("attn.Wqkv attn.Wqkv", "attn.Wo mlp.Wo", 4),
    "deberta-v2": (QUERY_VALUE, "attention.output.dense output.dense", 4),
    "distilbert": ("attention.q_lin attention.v_lin", "attention.out_lin ffn.lin2", 4),
    "albert": ("attention.query attention.value", "attention.dense ffn_output", 4),
}


@pytest.mark.parametrize("family", PLACES)
def test_layers_are_found_by_structure(family: str) -> None:
    net = build(family)
    layers = layers_of(net)
    assert len(layers) == (1 if family == "albert" else 2)
    last, inside = layers[-1], f"{layers[-1].name}."
    names, ends, heads = PLACES[family]
    projections = names.split(" ") * (1 + (" " not in names))
    assert [last.query.removeprefix(inside), last.value.removeprefix(inside)] == projections
    assert [end.removeprefix(inside) for end in last.ends] == ends.split(" ")
    assert {net_layers.outputs_of(net, end) for end in last.ends} == {32}
    assert (last.heads, last.width) == (heads, 8 if heads else 0)
    assert net_layers.is_causal(net) == (family in families.DECODERS)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_body_is_what_the_net_calls(family: str) -> None:
    net, called = build(family), []
    hook = body_of(net).register_forward_pre_hook(lambda module, args: called.append(module))
    with torch.inference_mode():
        net(input_ids=torch.zeros(1, 4, dtype=torch.long))
    hook.remove()
    assert called == [body_of(net)]


def test_what_a_family_lacks_is_said() -> None:
    with pytest.raises(ModelError, match="1 of the 2 layers of a Lfm2ForCausalLM have none"):
        net_layers.attention_layers(build("lfm2"), "a prefix")
    with pytest.raises(ModelError, match="has 1 that it runs 2 times"):
        net_layers.check_separate(build("albert"), "fedpeptao")


IDS = torch.tensor([[5, 9, 20, 5, 3, 26, 2], [1, 4, 2, 3, 12, 8, 9]])


def trained(net: Any, context: Any) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step in train mode, and the numbers that autograd kept for it."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.is_leaf and tensor.requires_grad else tensor.numel()
        return tensor

    net.train().requires_grad_(True)
    torch.manual_seed(7)
    with context:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(input_ids=IDS, labels=IDS, use_cache=False).loss
        before = kept  # the backward pass keeps a layer's for a while
        loss.backward()
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found, before


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba"])
def test_gradients_are_the_same_bits_with_dropout_and_less_is_kept(family: str) -> None:
    dropout = {"gpt2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2}, "falcon": {"hidden_dropout": 0.2}}
    net: Any = build(family, **dropout.get(family, {}))
    whole, much = trained(net, nullcontext())
    again, less = trained(net, by_layer(net, small=0))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert less < 0.7 * much


def test_the_layers_are_as_they_were_afterwards() -> None:
    net = build("llama")
    layers = [net.get_submodule(layer.name) for layer in layers_of(net)]
    mark = layers[0].forward = layers[0].forward  # one has a forward of its own
    with pytest.raises(RuntimeError, match="stop"), by_layer(net):
        assert all("forward" in layer.__dict__ for layer in layers)
        raise RuntimeError("stop")
    assert [layer.__dict__.get("forward") for layer in layers] == [mark, None]


def test_a_small_batch_keeps_its_activations() -> None:
    net: Any = build("llama")
    entering = IDS.numel() * net.config.hidden_size * 4 * net.config.num_hidden_layers
    _, all_of_them = trained(net, nullcontext())
    assert trained(net, by_layer(net))[1] == all_of_them
    assert trained(net, by_layer(net, small=entering + 1))[1] == all_of_them
    assert trained(net, by_layer(net, small=entering))[1] < all_of_them


def test_a_step_keeps_its_activations_where_they_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = build("llama", num_hidden_layers=5)
    whole, much = trained(net, nullcontext())
    again: list[int] = []

    def counted(*args: Any, **how: Any) -> Any:
        again.append(1)
        return checkpoint(*args, **how)

    monkeypatch.setattr(net_layers, "checkpoint", counted)
    with by_layer(net, small=0, room=lambda: 1 << 40) as seen:
        trained(net, nullcontext())
    entering = IDS.numel() * net.config.hidden_size * 4
    weights = sum(p.numel() for layer in layers_of(net) for p in net.get_submodule(layer.name).parameters())
    assert not again
    assert (much - weights) * 2 < 5 * seen.each * entering < (much + weights) * 6  # bytes, of numbers of 4
    # of five layers the first alone is kept where a guess says that there is room and its activations that there is none
    for share, counts in {0.0: [5, 5], 0.5: [5, 5], 0.99: [4, 5], 1.01: [0, 0]}.items():
        asked: list[float] = []

        def room(share: float = share, asked: list[float] = asked) -> float:
            asked.append(share * 5 * HEAP * seen.each * entering)
            return asked[-1]

        with by_layer(net, small=0, room=room) as found:
            for count in counts:
                again.clear()
                grads, _ = trained(net, nullcontext())
                assert all(torch.equal(whole[name], grads[name]) for name in whole)
                assert len(again) == count
                assert found.recomputed == (count > 0)
        assert len(asked) == 1  # once a block, not a step


def test_free_memory_is_given_back_every_few_layers_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = build("llama", num_hidden_layers=7)
    given: list[int] = []
    monkeypatch.setattr(net_layers, "give_back", lambda: given.append(1))
    trained(net, by_layer(net, small=0))
    assert not given  # a layer is entered by some kB
    monkeypatch.setattr(net_layers, "LARGE", 1)
    trained(net, by_layer(net, small=0))
    assert len(given) == 2  # one layer of each five, on the way there and back
