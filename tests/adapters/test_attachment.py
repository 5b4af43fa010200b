"""Every trainable module on decoders and encoders: start, training, leaving."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from adapters_harness import IDS, MASK, NETS, SPECS, each, on, out, stored, tiny
from torch import nn

from fleetune import adapters, models
from fleetune.adapters import Bitfit, Bottleneck, Lora, Prefix, Prompt
from fleetune.adapters.attachment import ParameterCopies
from fleetune.data.encode import Batch
from fleetune.deploy.checkpoint import Tuned
from fleetune.errors import ModelError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import Model
from fleetune.models.net.layers import by_layer


@each
def test_the_start_is_a_function_of_the_seed_and_moves_little(net: str, name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = on(net, SPECS[name], tuned=False)
    assert torch.equal(torch.get_rng_state(), state)
    names, arrays = list(adapters.trainable(one)), adapters.export(one)
    assert names == sorted(names)
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    torch.manual_seed(2)
    assert adapters.digest(arrays) == adapters.digest(adapters.export(on(net, SPECS[name], tuned=False)))
    other = adapters.digest(adapters.export(on(net, SPECS[name], 2, tuned=False)))
    drawn = name not in ("bitfit", "full")
    assert (other != adapters.digest(arrays)) == drawn
    if name not in ("prefix", "some layers", "prompt"):
        assert torch.equal(out(one), out(NETS[net]()))


@pytest.mark.parametrize("net", ["bert", "roberta"])
@pytest.mark.parametrize("name", ["lora", "houlsby", "prompt", "bitfit"])
def test_a_classification_head_is_trained_with_every_module(net: str, name: str) -> None:
    model = on(net, SPECS[name])
    head = {n for n, _ in NETS[net]().net.named_parameters() if n.startswith("classifier") or ".pooler." in n}
    assert len(head) == 4
    assert head <= set(adapters.trainable(model))


def test_bitfit_takes_biases_where_there_are_some() -> None:
    assert all(n.endswith("norm.weight") for n in adapters.trainable(on("llama", Bitfit())))
    names = set(adapters.trainable(on("bert", Bitfit())))
    biases = {n for n, _ in models.tiny_bert().net.named_parameters() if n.endswith("bias")}
    assert biases < names
    assert names - biases == {"bert.pooler.dense.weight", "classifier.weight"}


def test_a_bias_that_only_chooses_experts_is_none() -> None:
    """It has no gradient; without others the norms are trained."""
    model = models.tiny_llama()
    layer = model.net.model.layers[0]
    layer.mlp.moe_statics = nn.Module()
    layer.mlp.moe_statics.e_score_correction_bias = nn.Parameter(torch.zeros(1, 4), requires_grad=False)
    adapters.attach(model, Bitfit(), seed=1)
    assert all(n.endswith("norm.weight") for n in adapters.trainable(model))


def batch(model: Model) -> Batch:
    labels = torch.tensor([0, 1, 1]) if model.labels else torch.where(MASK.bool(), IDS, -100)
    return Batch(IDS, MASK, labels)


@each
def test_training_reaches_every_number_and_lowers_the_loss(net: str, name: str) -> None:
    model = on(net, SPECS[name])
    parameters = adapters.trainable(model)
    optimizer = torch.optim.Adam(parameters.values(), lr=5e-3)
    losses = []
    with adapters.training(model, 5):
        for _ in range(8):
            loss = loss_tensor(model, batch(model))
            loss.backward()
            losses.append(loss.item())
            assert [n for n, p in parameters.items() if p.grad is None] == []
            others = [p for p in model.net.parameters() if not any(p is q for q in parameters.values())]
            assert all(p.grad is None for p in others)
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapters.detach(model)
    assert stored(model) == model.digest


@each
def test_gradient_checkpointing_changes_no_gradient(net: str, name: str) -> None:
    grads = []
    for context in (lambda net: nullcontext(), lambda net: by_layer(net, small=0)):
        model = on(net, SPECS[name])
        with adapters.training(model, 5), context(model.net):
            loss_tensor(model, batch(model)).backward()
            grads.append({n: p.grad.clone() for n, p in adapters.trainable(model).items()})
    for n, grad in grads[0].items():
        assert torch.equal(grads[1][n], grad), n


@pytest.mark.parametrize("name", SPECS)
def test_on_16_bits_the_numbers_stay_fp32_and_the_start_is_the_base(name: str) -> None:
    base, model = tiny(torch.bfloat16), tiny(torch.bfloat16)
    before = stored(model)
    adapters.attach(model, SPECS[name], seed=1)
    assert {p.dtype for p in adapters.trainable(model).values()} == {torch.float32}
    if name not in ("prefix", "some layers", "prompt"):
        assert torch.equal(out(model), out(base))
    with adapters.training(model, 1):
        loss_tensor(model, batch(model)).backward()
        assert {p.grad.dtype for p in adapters.trainable(model).values()} == {torch.float32}
    adapters.detach(model)
    assert stored(model) == before


@each
def test_detach_gives_the_base_back_bit_for_bit(net: str, name: str) -> None:
    base, model = NETS[net](), on(net, SPECS[name])
    assert not torch.equal(out(model), out(base))
    adapters.detach(model)
    assert stored(model) == model.digest == base.digest
    assert torch.equal(out(model), out(base))
    assert model.net.config._attn_implementation == base.net.config._attn_implementation
    for left, right in zip(model.net.modules(), base.net.modules(), strict=True):
        assert type(left) is type(right)
        assert set(vars(left)) == set(vars(right))
        assert not left._forward_hooks
        assert [*left._forward_pre_hooks.values()] == [*right._forward_pre_hooks.values()]
    assert not any(p.requires_grad for p in model.net.parameters())
    adapters.attach(model, SPECS[name], seed=1)  # and it can be used again


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["lora", "bitfit", "full"])
def test_merge_folds_what_is_a_change_of_weights(net: str, name: str) -> None:
    model = on(net, SPECS[name])
    before, digest = out(model), model.digest
    model.merge()
    torch.testing.assert_close(out(model), before, rtol=0, atol=5e-5)
    assert model.attachment is None
    assert model.digest == stored(model) != digest
    lifted = Tuned(on(net, SPECS[name]))  # the same weights, a tensor at a time
    assert lifted.moved
    assert models.digest(lifted.tensors()) == model.digest
    assert stored(lifted.model) == digest


@pytest.mark.parametrize("net", ["llama", "bert"])
@pytest.mark.parametrize("name", ["houlsby", "prefix", "prompt"])
def test_merge_refuses_what_is_more_than_weights(net: str, name: str) -> None:
    model = on(net, SPECS[name])
    before = out(model)
    with pytest.raises(ModelError, match="folded") as caught:
        adapters.merge(model)
    assert caught.value.hint
    assert torch.equal(out(model), before)
    adapters.detach(model)
    assert stored(model) == model.digest


def test_a_parent_that_reads_16_bit_parameters_sees_them_rounded() -> None:
    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.inner.weight.T + self.inner.bias

    net = Mixer().to(torch.bfloat16).requires_grad_(False)
    x, stored = torch.ones(1, 3, dtype=torch.bfloat16), net.inner.weight
    before = net(x)
    first, second = ParameterCopies(net, {"inner.bias"}), ParameterCopies(net, {"inner.weight"})
    assert torch.equal(net(x), before)  # bf16 whoever reads
    net(x).sum().backward()
    for part, name in ((first, "inner.bias"), (second, "inner.weight")):
        assert part.parameters[name].dtype == part.parameters[name].grad.dtype == torch.float32
    second.remove()
    first.remove()
    assert net.inner.weight is stored
    assert type(net.inner._parameters) is dict


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Bottleneck(0), "size 0"),
        (Bottleneck(4, "sideways"), "sideways"),
        (Prefix(0), "0 tokens"),
        (Prefix(3, layers=[2]), r"layers \[2\]"),
        (Prefix(3, layers=[]), r"layers \[\]"),
        (Prompt(0), "0 tokens"),
        (Prefix(4097), "4097 tokens"),
        (Prompt(4097), "4097 tokens"),
        (Lora(0, 8.0), "r = 0"),
        (Lora(4, 8.0, 1.0), r"dropout = 1\.0"),
        (Lora(4, 8.0, init="magic"), "no LoRA start named 'magic'"),
        (Lora(4, 8.0, targets="q_proj,w_proj"), "no linear layer named 'w_proj'"),
        (Lora(4, 8.0, targets="lm_head"), "no linear layer named 'lm_head'"),
    ],
)
def test_what_cannot_be_attached_leaves_the_model_alone(spec: Any, message: str) -> None:
    model = models.tiny_llama()
    with pytest.raises(ModelError, match=message) as caught:
        adapters.attach(model, spec, seed=1)
    assert caught.value.hint
    assert model.attachment is None
    assert stored(model) == model.digest
    with pytest.raises(ModelError, match="carries no adapter"):
        adapters.export(model)
    adapters.attach(model, Prompt(2), seed=1)
    with pytest.raises(ModelError, match="already carries a Prompt"):
        adapters.attach(model, Prompt(2), seed=1)
