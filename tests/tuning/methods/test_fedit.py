"""fedit (and fedpetuning's LoRA) beyond the contract: devices of unlike ranks, starts that the server owns."""

from typing import Any

import numpy as np
import pytest
import torch

from fleetune import adapters, models
from fleetune.data import Batches, Encoded
from fleetune.errors import DataError, MessageError, ModelError, UsageError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import Model
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, check, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

BASE = b"12345678"
SIZES = (6, 9, 3)
IDS = torch.arange(40).reshape(2, 20)
FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 3, "dropout": 0.0}


def rows(count: int, seed: int, labels: int = 0) -> list[Encoded]:
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = random.integers(0, 250, 12).astype(np.int32)
        made.append(Encoded(ids, 12, None, i % labels) if labels else Encoded(ids, 4))
    return made


def fleet_of(model: Model, method: Any) -> LocalFleet:
    parts = [rows(n, seed, len(model.labels)) for seed, n in enumerate(SIZES)]
    return LocalFleet(model, method, parts, 7, 0)


def batches_of(client: int) -> Any:
    return Batches(rows(SIZES[client], client), 0, 99, "cpu", client)


def round_of(fleet: LocalFleet, state: Any, r: int = 1) -> tuple[list[Reply], list[int], list[int]]:
    """(replies, bytes down, bytes up) of everybody in a round, each through the door."""
    found, clients, kept = fleet.method.kinds(state), range(len(fleet.rows)), fleet.kept()
    kinds = [found[fleet.method.kind_of(c)] for c in clients]
    down = {c: fleet.method.news(state, kept[c][0], 0) if c in kept else kinds[c][0] for c in clients}
    sent = {c: encode(Message(r, BASE, down[c])) for c in clients}
    replies, up = [], []
    for answer in fleet.ask(r, clients, sent):
        assert answer.data is not None, answer.reason
        payload = check(decode(answer.data), kinds[answer.client][1], round=r, base=BASE)
        replies.append(Reply(answer.client, answer.key, payload))
        up.append(len(answer.data))
    return replies, [len(m) for m in sent.values()], up


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.net(input_ids=IDS).logits.double()


def weights(model: Model) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in model.net.named_parameters()}


def lora_layers_of(model: Model) -> set[str]:
    return {n.split(".")[-3] for n in adapters.trainable(model) if ".lora_A." in n}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("query-value", {"q_proj", "v_proj"}),
        ("o_proj, mlp.down_proj", {"o_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_is_put_on_the_layers_that_are_named_on_both_sides(tmp_path, targets, layers):
    model, device = models.tiny_llama(), models.tiny_llama()
    method = methods.make("fedit", FAST | {"r": 2, "targets": targets})
    state = method.init(model, 5)
    assert lora_layers_of(model) == layers
    sent = method.local(device, method.broadcast(state), batches_of(0), 3, {})
    assert lora_layers_of(device) == layers
    assert sent.arrays.keys() == state.tensors.keys()
    adapters.save(device, tmp_path / "a")
    again = models.tiny_llama()
    adapters.load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(device))


def test_an_adapter_on_other_layers_is_replaced():
    model = models.tiny_llama()
    methods.make("fedit", FAST | {"r": 2}).init(model, 5)
    methods.make("fedit", FAST | {"r": 2, "targets": "q_proj"}).init(model, 5)
    assert lora_layers_of(model) == {"q_proj"}


def test_layers_that_the_model_lacks_are_told_with_those_that_it_has():
    with pytest.raises(ModelError, match="no linear layer named 'query'") as told:
        methods.make("fedit", FAST | {"targets": "query,v_proj"}).init(models.tiny_llama(), 5)
    assert "q_proj" in str(told.value.hint)


@pytest.mark.parametrize("more", [{}, {"warmup": 2, "weight_decay": 0.5, "clip": 1e-3, "mu": 0.1}])
def test_a_device_trains_as_one_of_fedpetuning_with_the_same_settings(more):
    """To the bit; and each setting moves the result."""
    common = {"lr": 1e-2, "batch_size": 3, "epochs": 2, "targets": "query-value"} | more
    as_paper = {"r": 4, "alpha": 4, "dropout": 0.0, "decay": True, "clip": 1.0}

    def trained(name: str, values: dict[str, Any]) -> dict[str, Any]:
        model, method = models.tiny_llama(), methods.make(name, values)
        return method.local(model, method.broadcast(method.init(model, 5)), batches_of(1), 3, {}).arrays

    fedit = trained("fedit", as_paper | common)
    same = trained("fedpetuning", {"module": "lora", "size": 4} | common)
    assert all(np.array_equal(fedit[n], same[n]) for n in fedit.keys() | same.keys())
    for name in more:
        without = trained("fedit", as_paper | {n: v for n, v in common.items() if n != name})
        assert any(not np.array_equal(fedit[n], without[n]) for n in fedit), name


def test_devices_of_unlike_ranks_are_sent_and_send_their_own():
    model = models.tiny_llama()
    method = methods.make("fedit", FAST | {"r": 4, "alpha": 8, "average": "product", "ranks": "1,4"})
    state = method.init(model, 5)
    replies, down, up = round_of(fleet_of(model, method), state)
    for reply in replies:
        rank = (1, 4)[reply.client % 2]
        for b, a in adapters.pairs(reply.payload.arrays).values():
            assert reply.payload.arrays[b].shape[1] == reply.payload.arrays[a].shape[0] == rank
    assert max(down[0], down[2], up[0], up[2]) < 0.5 * min(down[1], up[1])
    kinds = method.kinds(state)
    wrong = Message(1, BASE, replies[0].payload)
    with pytest.raises(MessageError, match="shape"):
        check(wrong, kinds[1][1], round=1, base=BASE)


def test_a_device_of_low_rank_trains_under_the_same_scale():
    """The factor before B A is alpha / r of the recipe, whatever the device's rank: else B A mean other things."""
    model = models.tiny_llama()
    method = methods.make("fedit", FAST | {"r": 4, "alpha": 12, "average": "product", "ranks": "1,4"})
    state = method.init(model, 5)
    base = weights(models.tiny_llama())
    for client in (0, 1):
        alone = models.tiny_llama()
        arrays = method.local(alone, method.kinds(state)[client][0], batches_of(client), 3, {}).arrays
        adapters.merge(alone)
        now = weights(alone)
        for layer, (b, a) in adapters.pairs(arrays).items():
            assert len(arrays[a]) == (1, 4)[client]
            want = base[f"{layer}.weight"] + 12 / 4 * arrays[b].astype(np.float64) @ arrays[a]
            np.testing.assert_allclose(now[f"{layer}.weight"], want, atol=1e-6)


@pytest.mark.parametrize("ranks", ["1,4", "2,1,1", "3"])
def test_the_tuned_weights_are_the_exact_mean_over_unlike_ranks(ranks):
    """Two rounds; the server's model against dense weights in float64: w0 + s sum_k p_k (B_k A_k + what k was not sent)."""
    model = models.tiny_llama()
    method = methods.make("fedit", FAST | {"r": 16, "alpha": 32, "average": "product", "ranks": ranks})
    state = method.init(model, 5)
    base = weights(models.tiny_llama())
    for r in (1, 2):
        replies, _, _ = round_of(fleet_of(model, method), state, r)
        total = sum(reply.payload.int("n") for reply in replies)
        before, state = state.tensors, method.aggregate(state, iter(replies))
        server = models.tiny_llama()
        method.apply(server, state)
        adapters.merge(server)
        now = weights(server)
        for layer, (b, a) in adapters.pairs(before).items():
            mean = np.zeros_like(base[f"{layer}.weight"])
            for reply in replies:
                own_b, own_a = (reply.payload.arrays[n].astype(np.float64) for n in (b, a))
                rank = len(own_a)
                unsent = before[b][:, rank:].astype(np.float64) @ before[a][rank:].astype(np.float64)
                mean += reply.payload.int("n") / total * (own_b @ own_a + unsent)
            want = base[f"{layer}.weight"] + 32 / 16 * mean
            np.testing.assert_allclose(now[f"{layer}.weight"], want, atol=3e-6)
            assert np.abs(mean).max() > 1e-3
        # rank 16 holds all that three devices of these ranks can say in two rounds
        assert state.cut < 1e-9
    assert method.report(state) == {"cut": state.cut}


def test_what_does_not_fit_the_global_rank_is_told():
    model = models.tiny_llama()
    method = methods.make("fedit", FAST | {"r": 2, "alpha": 4, "average": "product", "ranks": "2,1"})
    state = method.init(model, 5)
    replies, _, _ = round_of(fleet_of(model, method), state)
    assert method.aggregate(state, iter(replies)).cut > 1e-4
    assert method.aggregate(state, iter(replies[:1])).cut < 1e-9


CASES = [("fedit", {"r": 4, "alpha": 12, "dropout": 0.0}), ("fedpetuning", {"size": 4})]


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_server_and_devices_agree_on_what_was_taken_out(name, sizes, start):
    """Before, the model is the base; after a round everybody's weights are w0 + s (B A - B0 A0), in float64."""
    options = {"lr": 1e-2, "batch_size": 3} | sizes
    model, method = models.tiny_llama(), methods.make(name, options | {"start": start})
    state = method.init(model, 5)
    method.apply(model, state)
    base = models.tiny_llama()
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=2e-5)
    replies, _, _ = round_of(fleet_of(model, method), state)
    one = method.aggregate(state, iter(replies[:1]))
    device, server = models.tiny_llama(), models.tiny_llama()
    method.local(device, method.broadcast(state), batches_of(0), replies[0].key, {})
    adapters.load_(device, {n: a.copy() for n, a in replies[0].payload.arrays.items()})
    method.apply(server, one)
    assert torch.equal(logits(server), logits(device))
    stored, scale = weights(base), (12 / 4 if name == "fedit" else 1.0)
    adapters.merge(server)
    now = weights(server)
    moved = 0.0
    for layer, (b, a) in adapters.pairs(one.tensors).items():
        w = stored[f"{layer}.weight"]
        change = one.tensors[b].astype(np.float64) @ one.tensors[a]
        change -= state.start[b].astype(np.float64) @ state.start[a]
        np.testing.assert_allclose(now[f"{layer}.weight"], w + scale * change, atol=3e-6)
        moved = max(moved, float(np.abs(change).max()))
    assert moved > 1e-3


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_what_a_start_takes_out_goes_down_once_and_never_up(name, sizes):
    model = models.tiny_llama()
    plain = methods.make(name, {"lr": 1e-2, "batch_size": 3} | sizes)
    usual = round_of(fleet_of(models.tiny_llama(), plain), plain.init(models.tiny_llama(), 5))
    method = methods.make(name, {"lr": 1e-2, "batch_size": 3, "start": "pissa"} | sizes)
    state, fleet = method.init(model, 5), fleet_of(model, method)
    for r in (1, 2):
        replies, down, up = round_of(fleet, state, r)
        state = method.aggregate(state, iter(replies))
        assert (3 - r) * 0.95 * usual[1][0] < down[0] < (3 - r) * 1.05 * usual[1][0]
        assert up == usual[2]
    with pytest.raises(MessageError, match="does not remember the start"):
        method.local(model, method.news(state, 2, 0), batches_of(0), 1, {})


FROZEN: list[dict[str, Any]] = [
    {"variant": "ffa"},
    {"variant": "ffa", "start": "pissa"},
    {"variant": "sb", "start": "pissa"},
    {"variant": "sb", "start": "gradient"},
]


@pytest.mark.parametrize("values", FROZEN)
def test_the_trained_side_alone_moves_and_its_mean_is_that_of_the_products(values, tmp_path):
    """AdamW's steps in float64 along s B' G A' or s G A', G the gradient of the whole weights; W is w0 + s B R A throughout."""
    s, steps, lr = 12 / 4, 2, 1e-2
    method = methods.make("fedit", FAST | values | {"r": 4, "alpha": 12, "steps": steps, "batch_size": 9})
    model = models.tiny_llama()
    method.init(model, 6)  # whose factors do not stay
    state, fleet = method.init(model, 5), fleet_of(model, method)
    whole = adapters.attachment_of(model).parts[0]
    assert isinstance(whole, adapters.LoraPart)
    frozen = {n: t.detach().double().numpy().copy() for n, t in whole.frozen.items()}
    square, base = values["variant"] == "sb", weights(models.tiny_llama())
    layers = {n.removesuffix(".lora_A.weight"): a for n, a in frozen.items() if ".lora_A." in n}
    sides = {f"{n}.lora_{'R' if square else 'B'}.weight": n for n in layers}

    def outer(layer: str) -> np.ndarray:
        return frozen[f"{layer}.lora_B.weight"] if square else np.eye(len(base[f"{layer}.weight"]))

    assert {n: t.shape for n, t in state.tensors.items()} == {
        n: (4 if square else len(base[f"{layer}.weight"]), 4) for n, layer in sides.items()
    }
    assert not any(t.any() for t in state.tensors.values())
    assert bool(state.start) == ("start" in values)  # else A is a seed's
    for r, planes in ((1, len(state.start)), (2, 0)):
        replies, _, _ = round_of(fleet, state, r)
        assert all(reply.payload.arrays.keys() == sides.keys() for reply in replies)
        assert len([n for n in method.news(state, r - 1, 0).arrays if n.startswith("start/")]) == planes
        want = {n: t.astype(np.float64) for n, t in state.tensors.items()}
        m, v = ({n: np.zeros(t.shape) for n, t in want.items()} for _ in range(2))
        for t in range(1, steps + 1):
            for name, slope in gradient(
                base, {sides[n]: s * outer(sides[n]) @ x @ layers[sides[n]] for n, x in want.items()}
            ):
                side = next(n for n, layer in sides.items() if layer == name)
                g = s * outer(name).T @ slope @ layers[name].T
                m[side], v[side] = 0.9 * m[side] + 0.1 * g, 0.999 * v[side] + 0.001 * g * g
                step = m[side] / (1 - 0.9**t) / (np.sqrt(v[side] / (1 - 0.999**t)) + 1e-8)
                want[side] = want[side] - lr * step
        for name, side in want.items():
            np.testing.assert_allclose(replies[2].payload.arrays[name], side, rtol=0, atol=1e-3 * lr)
        state = method.aggregate(state, iter(replies))
        server = models.tiny_llama()
        method.apply(server, state)
        adapters.save(server, tmp_path / str(r))
        plain = models.tiny_llama()
        adapters.load(plain, tmp_path / str(r))
        assert torch.equal(logits(plain), logits(server))
        adapters.merge(server)
        for name, layer in sides.items():
            mean = sum(
                n * x.payload.arrays[name].astype(np.float64) for n, x in zip(SIZES, replies, strict=True)
            )
            product = s * outer(layer) @ mean / sum(SIZES) @ layers[layer]
            assert np.abs(product).max() > 1e-3
            now = weights(server)[f"{layer}.weight"]
            np.testing.assert_allclose(now, base[f"{layer}.weight"] + product, rtol=0, atol=1e-6)
    assert all(np.array_equal(frozen[n], t.detach().double().numpy()) for n, t in whole.frozen.items())


def gradient(base: dict[str, np.ndarray], moves: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The gradients of the third client's loss by the weights of these layers, at the base's and the moves."""
    model = models.tiny_llama()
    model.net.double()
    batch = next(iter(batches_of(2).steps(1, 9)))
    own = {name: model.net.get_parameter(f"{name}.weight") for name in moves}
    for name, parameter in own.items():
        parameter.data = torch.from_numpy(base[f"{name}.weight"] + moves[name])
        parameter.requires_grad_(True)
    with torch.enable_grad():
        found = torch.autograd.grad(loss_tensor(model, batch), list(own.values()))
    return [(name, g.numpy()) for name, g in zip(own, found, strict=True)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"variant": "xs"}, "variant = 'xs' is not one of lora, ffa, sb"),
        ({"variant": "sb"}, "use start=gradient"),
        ({"variant": "ffa", "average": "product"}, "use average=separate, and no ranks"),
    ],
)
def test_a_variant_that_cannot_be_is_told(values, words):
    with pytest.raises(UsageError) as told:
        methods.make("fedit", values)
    assert words in str(told.value)


def test_eva_starts_from_the_servers_rows(tmp_path):
    mine, starts = tmp_path / "mine.jsonl", {}
    mine.write_text("".join(f'{{"instruction": "say {i}", "response": "red{i} {i}"}}\n' for i in range(40)))
    swapped = "prompt=response,response=instruction"  # of the tuning rows
    for source, columns in (("demo", ""), (str(mine), swapped), ("demo", "prompt=ask"), (str(mine), "")):
        method = methods.make("fedit", FAST | {"r": 4, "start": "eva", "start_data": source})
        model = models.tiny_llama()
        model.columns = columns
        before = starts.get(source)
        state = method.init(model, 5)
        assert state.start == {}
        starts[source] = state.tensors["model.layers.1.self_attn.q_proj.lora_A.weight"].astype(np.float64)
        np.testing.assert_allclose(starts[source] @ starts[source].T, np.eye(4), atol=1e-5)
        if before is not None:  # the demo lacks the column, and is read by its own
            assert np.array_equal(before, starts[source]) == (source == "demo")
    assert np.abs(starts["demo"] @ starts[str(mine)].T - np.eye(4)).max() > 0.1
    values = {
        "model": "m",
        "data": "demo",
        "method": "fedit",
        "set": {"start": "eva", "start_data": "no.csv"},
    }
    with pytest.raises(DataError, match="no file"):
        prepare.check(recipes.make(values))
    state = methods.make("fedpetuning", {"size": 2, "start": "eva"}).init(models.tiny_bert(), 5)
    a = state.tensors["bert.encoder.layer.1.attention.self.query.lora_A.weight"]
    np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-5)
