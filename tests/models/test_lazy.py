"""A model whose weights stay in their file is the one in memory: values, products, gradients, digests."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stored import stored
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_families
from fleetune import models
from fleetune.errors import ModelError
from fleetune.models import lazy
from fleetune.models.lazy import LazyWeight, Memory, into_memory, leave_in_file, weights_of
from fleetune.models.net.layers import by_layer
from fleetune.models.stored import of_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes


@pytest.fixture(params=["Q4_1", "BF16", "F32"])
def weight(request: pytest.FixtureRequest, tmp_path: Path) -> LazyWeight:
    return LazyWeight.make("w", stored(tmp_path, request.param, 6, 64), torch.float32, Memory())


def test_it_looks_like_a_parameter(weight: LazyWeight) -> None:
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.numel()) == ((6, 64), 384)
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert weight.untyped_storage is not None
    values = weight.values()
    for found in (weight.detach(), weight.data, weight.double(), weight + 0):
        assert type(found) is Tensor
        assert torch.equal(found, values.to(found.dtype))
    assert type(copied := copy.deepcopy(weight)) is nn.Parameter
    assert torch.equal(copied, values)
    assert weight.to("cpu") is weight.cpu() is weight.requires_grad_(False) is weight
    assert _module(weight).to("cpu").weight is weight
    weight.requires_grad = False
    assert torch.equal(torch.stack([weight, weight])[1], values)
    assert torch.equal(torch.cat([part.clone() for _, part in weight.pieces()]).view(6, 64), values)
    assert weight.numpy().tobytes() == values.numpy().tobytes()


def _module(weight: LazyWeight) -> nn.Module:
    layer = nn.Linear(64, 6)
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.zeros(6, 64)),
        lambda w: w.untyped_storage(),
        lambda w: w.data_ptr(),
        lambda w: setattr(w, "data", torch.zeros(6, 64)),
        lambda w: nn.init.zeros_(w),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.add(torch.zeros(6, 64), 1.0, out=w),
        lambda w: w.requires_grad_(True),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: nn.Module.to(_module(w), torch.float16),
    ],
)
def test_what_would_change_it_is_refused(weight: LazyWeight, change: Any) -> None:
    before = weight.values()
    with pytest.raises(ModelError, match="stays in its file"):
        change(weight)
    assert torch.equal(weight.values(), before)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_and_its_gradients(
    weight: LazyWeight, streams: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "BLOCK", 128)  # two rows
    weight.streams = streams
    draw = torch.Generator().manual_seed(0)
    x, g, b = (torch.randn(shape, generator=draw) for shape in ((3, 5, 64), (3, 5, 6), (6,)))
    found = []
    for matrix in (weight, weight.values()):
        inputs = x.clone().requires_grad_(), (b.clone().requires_grad_() if biased else None)
        out = F.linear(inputs[0], matrix, inputs[1])
        out.backward(g)
        with torch.inference_mode():
            plain = F.linear(x, matrix, b if biased else None)
        found.append([out.detach(), plain, *(i.grad for i in inputs if i is not None)])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        if streams:
            torch.testing.assert_close(mine, theirs)
        else:
            assert torch.equal(mine, theirs)


def test_it_can_be_differentiated_twice(weight: LazyWeight) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def second(matrix: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(F.linear(x, matrix).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(weight), second(weight.values()))


def test_an_embedding_reads_the_rows_in_use(weight: LazyWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Embedding(6, 64, padding_idx=2)
    values = weight.values()
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    ids = torch.tensor([[5, 2, 5], [0, 0, 2]])
    monkeypatch.setattr(LazyWeight, "values", None)  # not whole
    assert torch.equal(layer(ids), values[ids])
    for wrong in (-1, 6):
        with pytest.raises(IndexError):
            layer(torch.tensor([0, wrong]))


def test_values_that_replace_the_files_are_seen_everywhere(weight: LazyWeight) -> None:
    other = torch.randn(6, 64)
    weight.memory.changed = lambda name: other if name == "w" else None
    x = torch.randn(2, 64)
    assert torch.equal(weight.values(), other)
    assert torch.equal(F.linear(x, weight), F.linear(x, other))
    assert torch.equal(F.embedding(torch.tensor([1]), weight), other[1:2])
    assert torch.equal(weight.piece(10, 70), other.view(-1)[10:70])


def test_threads_have_scratch_of_their_own(weight: LazyWeight) -> None:
    x = torch.randn(3, 64)
    expected = F.linear(x, weight.values())
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: torch.equal(F.linear(x, weight), expected), range(400)))
    assert all(found)


# their experts, or their parts, are put together while a model is loaded
STACKED = ["mixtral", "qwen3_moe", "gpt_neox"]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "mamba", "phi", "gpt_oss", "lfm2", "bert"]
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bf16"), *((family, "fp32") for family in FAMILIES)])
def test_a_model_of_any_family_is_the_one_in_memory(family: str, dtype: str, tmp_path: Path) -> None:
    folder = str(tiny_families.save(family, tmp_path))
    whole, mapped = (models.load(folder, device="cpu", dtype=dtype, base=at) for at in ("memory", "mapped"))
    assert mapped.digest == whole.digest
    assert models.digest(models.named_tensors(mapped.net)) == whole.digest
    for name, tensor in models.named_tensors(mapped.net):
        assert isinstance(tensor, LazyWeight) == (tensor.dim() > 1), name
    with torch.inference_mode():
        outs = [m.net(input_ids=IDS, output_hidden_states=True) for m in (whole, mapped)]
    assert all(torch.equal(a, b) for a, b in zip(*(out.hidden_states for out in outs), strict=True))
    # the head goes by blocks
    torch.testing.assert_close(outs[0].logits, outs[1].logits, rtol=0.02, atol=1e-3)
    into_memory(mapped.net)
    with torch.inference_mode():
        assert torch.equal(mapped.net(input_ids=IDS).logits, outs[0].logits)


def test_activations_are_kept_beside_weights_that_lie_in_a_file(tmp_path: Path) -> None:
    folder, grads, seen = str(tiny_families.save("llama", tmp_path)), [], []
    for base, room in (("memory", math.inf), ("mapped", math.inf), ("mapped", 0)):
        net: Any = models.load(folder, device="cpu", base=base).net
        x = net.get_input_embeddings()(IDS).detach().requires_grad_()
        with by_layer(net, small=0, room=lambda room=room: room) as found:
            net.model(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
        grads.append(x.grad)
        seen.append(found.recomputed)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])
    assert seen == [False, False, True]


@pytest.mark.parametrize("family", STACKED)
def test_experts_that_are_put_together_are_refused_or_taken_into_memory(family: str, tmp_path: Path) -> None:
    folder = str(tiny_families.save(family, tmp_path))
    with pytest.raises(ModelError, match="in another form") as refused:
        models.load(folder, device="cpu", base="mapped")
    assert "--base memory" in (refused.value.hint or "")
    whole = models.load(folder, device="cpu")
    found = models.load(folder, device="cpu", base="auto", ram=1000)
    assert found.digest == whole.digest
    assert not weights_of(found.net)


def test_shards_and_names_without_their_beginning_are_found(tmp_path: Path) -> None:
    tiny = models.tiny_llama()
    tiny.net.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny.net.save_pretrained(tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    tensors = {n.removeprefix("model."): t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("shards", "short"):
        tiny.tokenizer.save_pretrained(tmp_path / name)
        model = models.load(str(tmp_path / name), device="cpu", base="mapped")
        assert model.digest == tiny.digest


def test_tensors_of_other_names_are_refused(tmp_path: Path) -> None:
    tiny = models.tiny_llama()
    tiny.net.save_pretrained(tmp_path)
    tensors = of_folder(tmp_path)
    tensors["model.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    net = copy.deepcopy(tiny.net)
    with torch.no_grad():
        for p in net.parameters():
            p.data = torch.zeros(()).expand(p.shape)
    with pytest.raises(ModelError, match="in another form") as refused:
        leave_in_file(net, tensors, torch.float32, tmp_path)
    assert "mlp.up_proj" in str(refused.value)
