"""What prefixes, bottleneck adapters and prompts compute, against the papers' formulas in numpy float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from adapters_harness import IDS, MASK, NETS, SPECS, on, out
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune import adapters, models
from fleetune.adapters import Bottleneck, Prefix, Prompt, prefix
from fleetune.evaluation.answers import generate_from_ids
from fleetune.models import Model
from fleetune.models.net.layers import layers_of


def plain_attention(q: Any, k: Any, v: Any, pk: Any, pv: Any, seen: Any) -> Any:
    """softmax(q [Pk; k]^T / sqrt d) [Pv; v], head by head, row by row: [B, heads, T, d] each."""
    made = np.zeros_like(q)
    batch, heads, rows, d = q.shape
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            keys, values = np.concatenate([pk[g], k[b, g]]), np.concatenate([pv[g], v[b, g]])
            for t in range(rows):
                allowed = np.concatenate([np.ones(len(pk[g]), bool), seen[b, t]])
                scores = keys[allowed] @ q[b, h, t] / math.sqrt(d)
                shares = np.exp(scores - scores.max())
                made[b, h, t] = shares @ values[allowed] / shares.sum()
    return made


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    st.sampled_from(["causal", "bool", "added", "none"]),
    st.sampled_from(["sdpa", "eager"]),
    st.integers(0, 99),
)
def test_attention_with_a_prefix_is_the_formula(
    batch: int, rows: int, past: int, heads: tuple[int, int], masked: str, kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    d, tokens, length = 4, 3, rows + past
    q = random.normal(size=(batch, heads[0], rows, d))
    k, v = random.normal(size=(2, batch, heads[1], length, d))
    flat = random.normal(size=(2, tokens, heads[1] * d))
    seen = np.ones((batch, rows, length), bool)
    mask = None
    if masked == "causal":
        seen &= np.tril(np.ones((rows, length), bool), past)
    elif masked in ("bool", "added"):
        seen &= random.random((batch, rows, length)) < 0.6
        mask = torch.from_numpy(seen)[:, None]
        mask = mask if masked == "bool" else torch.where(mask, 0.0, -1e30).double()
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = masked == "causal", heads[0] // heads[1]  # type: ignore[assignment]
    pk, pv = (torch.from_numpy(x) for x in flat)
    setattr(module, prefix.ATTRIBUTE, prefix.LayerPrefix(pk, pv, heads[1], 0.0))
    function = {"sdpa": prefix._sdpa, "eager": prefix._eager}[kind]
    made, _ = function(module.eval(), *(torch.from_numpy(x) for x in (q, k, v)), mask, scaling=d**-0.5)
    split = [x.reshape(tokens, heads[1], d).swapaxes(0, 1) for x in flat]
    expected = plain_attention(q, k, v, *split, seen).swapaxes(1, 2)
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-12)


def captured(model: Model, name: str, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the module `name` was given and what it made of it, float64."""
    kept: list[Any] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        kept.extend((given, output[0] if isinstance(output, tuple) else output))

    hook = model.net.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    out(model, **inputs)
    hook.remove()
    return kept[0].double().numpy(), kept[1].double().numpy()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("net", NETS)
def test_a_layer_attends_to_its_prefix(net: str, kind: str, padded: bool) -> None:
    """The whole attention module against numpy: projections, rotation from position T on, masks, prefix."""
    model = NETS[net]()
    model.net.set_attn_implementation(kind)
    adapters.attach(model, Prefix(3), seed=1)
    adapters.load_(model, {n: a * 40 for n, a in adapters.export(model).items()})
    layer, arrays = layers_of(model.net)[1], adapters.export(model)
    mask = MASK if padded else torch.ones_like(MASK)
    x, made = captured(model, layer.attention, attention_mask=mask)
    d, heads = layer.width, 4
    weights = {n: p.detach().double().numpy() for n, p in model.net.named_parameters()}

    def project(name: str, n: int) -> np.ndarray:
        y = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        return y.reshape(*x.shape[:2], n, d).swapaxes(1, 2)

    q = project(layer.query, heads)
    k, v = (
        project(layer.value.replace("v_proj", w[0] + "_proj").replace("value", w), layer.heads)
        for w in ("key", "value")
    )
    seen = np.broadcast_to(mask.numpy()[:, None, :].astype(bool), (3, 16, 16))
    if net == "llama":
        angle = np.outer(np.arange(3, 19), 10000.0 ** (-np.arange(0, d, 2) / d))  # positions 3..18
        turn = np.concatenate([angle, angle], 1)
        q, k = (
            y * np.cos(turn) + np.concatenate([-y[..., d // 2 :], y[..., : d // 2]], -1) * np.sin(turn)
            for y in (q, k)
        )
        seen = seen & np.tril(np.ones((16, 16), bool))
    own = [arrays[f"{layer.attention}.prefix.{w}"].astype(np.float64) for w in ("key", "value")]
    own = [a.reshape(3, layer.heads, d).swapaxes(0, 1) for a in own]
    expected = plain_attention(q, k, v, *own, seen).swapaxes(1, 2).reshape(3, 16, -1)
    if net == "llama":
        expected = expected @ weights["model.layers.1.self_attn.o_proj.weight"].T
    real = mask.numpy().astype(bool)
    np.testing.assert_allclose(made[real], expected[real], atol=2e-5)


def test_layers_without_a_prefix_and_an_encoders_positions_are_as_they_were() -> None:
    for net, first in (("llama", "model.layers.0.mlp"), ("bert", "bert.encoder.layer.0.attention.self")):
        base, model = NETS[net](), on(net, Prefix(3, layers=[1]))
        np.testing.assert_allclose(captured(model, first)[1], captured(base, first)[1], atol=1e-5)
        assert (out(model) - out(base)).abs().max() > 1e-4


def test_a_bottleneck_is_the_formula() -> None:
    for net, end in (
        ("llama", "model.layers.1.mlp.down_proj"),
        ("bert", "bert.encoder.layer.0.attention.output.dense"),
    ):
        model = on(net, Bottleneck(6, norms=False))
        weights = {n: p.detach().double().numpy() for n, p in model.net.named_parameters()}
        arrays = adapters.export(model)
        x, made = captured(model, end)
        h = x @ weights[f"{end}.weight"].T + weights.get(f"{end}.bias", 0.0)
        down, d, up, u = (
            arrays[f"{end}.adapter.{n}"].astype(np.float64)
            for n in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        z = h @ down.T + d
        gelu = 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        np.testing.assert_allclose(made, h + gelu @ up.T + u, atol=2e-5)


def test_a_prompt_lies_before_the_words_or_behind_the_first() -> None:
    model, base = on("llama", Prompt(3)), models.tiny_llama()
    e = torch.from_numpy(adapters.export(model)["prompt.embeddings"]).expand(3, -1, -1)
    words = base.net.get_input_embeddings()(IDS)
    ones = torch.ones(3, 3, dtype=torch.long)
    with torch.inference_mode():
        whole = base.net(inputs_embeds=torch.cat([e, words], 1), attention_mask=torch.cat([ones, MASK], 1))
    torch.testing.assert_close(out(model), whole.logits[:, 3:][MASK.bool()], rtol=0, atol=1e-6)
    types = (torch.arange(16) > 5).long().expand(3, -1)
    model, base = on("bert", Prompt(3)), models.tiny_bert()
    adapters.load_(model, adapters.export(on("bert", Prompt(3), tuned=False)))
    e = torch.from_numpy(adapters.export(model)["prompt.embeddings"]).expand(3, -1, -1)
    words = base.net.get_input_embeddings()(IDS)

    def behind(first: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([first[:, :1], new, first[:, 1:]], 1)

    with torch.inference_mode():
        expected = base.net(
            inputs_embeds=behind(words, e),
            attention_mask=behind(MASK, ones),
            token_type_ids=behind(types, ones * 0),
        ).logits
    torch.testing.assert_close(out(model, token_type_ids=types), expected, rtol=0, atol=1e-6)
    assert (expected - out(base, token_type_ids=types)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["prefix", "prompt", "houlsby"])
def test_generation_with_its_cache_and_padding_is_the_argmax_of_whole_forwards(name: str) -> None:
    model = on("llama", SPECS[name])
    prompts = [np.arange(7, 19), np.arange(40, 45)]  # one is padded on the left
    answers = generate_from_ids(model, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt.tolist()
        for _ in range(6):
            with torch.inference_mode():
                logits = model.net(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        assert answer == model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
