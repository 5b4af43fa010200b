"""Calibration on the devices: the central result from sums alone, and what becomes of devices that fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from command_line import call_json, ok, pressed_when
from fleetune import compression, models
from fleetune.cli.main import main
from fleetune.compression.layerwise import driver, federated
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.driver import linears_of
from fleetune.compression.layerwise.federated import ClientHessians, from_lower_triangle, lower_triangle
from fleetune.data.encode import encode_all
from fleetune.models import Model
from fleetune.models.artefact import Master, dense
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.prepare import prepare
from fleetune.tuning.result import finished


def text(count: int, length: int = 16, seed: int = 3) -> Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(seed))


Change = Callable[[ClientHessians], None]
SHARES = {0: text(3, seed=1), 2: text(1, seed=2), 5: text(4, seed=3)}
SOLVER: Any = compression.make("optq", {"group": 8})


def by_clients(
    model: Model, shares: dict[int, Tensor], folder: Path, change: Any = lambda c: None, solver: Any = SOLVER
) -> tuple[FinishedBlocks, list[federated.HessianReply]]:
    replies: list[federated.HessianReply] = []
    clients = ClientHessians(model, shares, folder, replies.append)
    change(clients)
    return driver.run(model, solver, clients, folder), replies


def same(a: FinishedBlocks, b: FinishedBlocks) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(dense(a[name]), dense(b[name])), name


@pytest.mark.parametrize("method", ["optq", "sparsegpt"])
def test_one_client_gives_the_central_result_bit_for_bit(method: str, tmp_path: Path) -> None:
    solver: Any = compression.make(method, {"group": 8, "bits": 4})
    model, windows = models.tiny_llama(), text(4)
    central = driver.run(model, solver, windows, tmp_path / "central")
    parts, _ = by_clients(model, {7: windows}, tmp_path / "clients", solver=solver)
    same(central, parts)
    assert [b.matrices for b in parts.blocks] == [b.matrices for b in central.blocks]


def test_where_tokens_are_claimed_none_counts_more_than_the_median(tmp_path: Path) -> None:
    _, linears = linears_of(models.tiny_llama())[0]
    name, C = "model.layers.0.self_attn.q_proj", 32
    linears = {name: linears[name]}
    tokens = {0: 100, 1: 100, 2: 5000}
    H = 2.0 * torch.eye(C)
    sent = {c: federated.message_of({name: n * H}, n, 0, bytes(8)) for c, n in tokens.items()}

    def total(claimed: bool) -> float:
        added = federated.HessianSums(bytes(8), tokens, lambda reply: None, tmp_path, claimed=claimed)
        answers = [federated.BlockAnswer(client, data, "") for client, data in sent.items()]
        return float(added.add_up(0, linears, answers, 0)[name][0, 0])

    assert total(False) == pytest.approx(2 * 5200)
    assert total(True) == pytest.approx(2 * 300)


def test_many_clients_give_the_central_result_on_the_union(tmp_path: Path) -> None:
    """Sums in float32 (the central ones) are rounded otherwise, codes may differ by that.

    On a grid whose scales follow from the weights alone: of those that are fitted by the Hessian two may be as good, and
    which is taken depends on such rounding.
    """
    model, solver = models.tiny_llama(), compression.make("optq", {"group": 8, "grid": "symmetric"})
    central = driver.run(model, solver, torch.cat(list(SHARES.values())), tmp_path / "central")
    parts, _ = by_clients(model, SHARES, tmp_path / "clients", solver=solver)
    for name in central:
        a, b = central[name], parts[name]
        assert (a.codes != b.codes).float().mean() < 0.002
        assert torch.allclose(a.scale.float(), b.scale.float(), rtol=1e-2)


def test_the_sums_are_those_of_all_text(tmp_path: Path) -> None:
    model = models.tiny_llama()
    _, linears = linears_of(model)[0]
    with torch.inference_mode():
        H = ClientHessians(model, SHARES, tmp_path, lambda reply: None).hessians(0, linears)
        stream = HiddenStates(model, torch.cat(list(SHARES.values())))
        want = stream.hessians(0, linears)
    assert H["model.layers.0.self_attn.q_proj"] is H["model.layers.0.self_attn.v_proj"]
    assert set(H) == set(want)
    for name in H:
        torch.testing.assert_close(H[name], want[name], rtol=1e-6, atol=1e-6 * want[name].abs().max().item())


def test_a_triangle_holds_the_matrix() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    H = (H + H.T) / 2
    assert lower_triangle(H).shape == (15,)
    assert torch.equal(from_lower_triangle(lower_triangle(H), 5), H)
    assert lower_triangle(H)[federated._diagonal_indices(5)].tolist() == H.diagonal().tolist()


def broken(kind: str, data: bytes) -> bytes:
    message = decode(data)
    arrays, scalars = dict(message.payload.arrays), dict(message.payload.scalars)
    name = next(iter(arrays))
    values = arrays[name].copy()
    if kind == "not finite":
        values[3] = np.nan
    elif kind == "below zero":
        values[0] = -1.0
    elif kind == "other shape":
        values = values[:-1]
    elif kind == "other tokens":
        scalars["tokens"] = 10**6
    elif kind == "other layers":
        scalars["model.layers.1.mlp.up_proj"] = name
    elif kind == "damaged":
        return data[:-1] + bytes([data[-1] ^ 1])
    arrays[name] = values
    base = bytes(8) if kind == "other model" else message.base
    number = message.round + (kind == "other block")
    return encode(Message(number, base, Payload(arrays, scalars)))


WRONG = {
    "not finite": "holds 1 values that are not finite",
    "below zero": "1 sums of squares below zero",
    "other shape": "agreed was float32",
    "other tokens": "of 1000000 tokens",
    "other layers": "not about the layers",
    "damaged": "checksum",
    "other model": "this is block",
    "other block": "reply is for block 2",
}


def another(spoil: Callable[[bytes, Any], bytes], client_and_block: tuple[int, int] = (2, 1)) -> Change:
    """Let the answer of a client in a block be another."""

    def change(clients: ClientHessians) -> None:
        real = clients.answer

        def answer(client: int, number: int, linears: Any) -> bytes:
            data = real(client, number, linears)
            return spoil(data, linears) if (client, number) == client_and_block else data

        clients.answer = answer  # type: ignore[method-assign]

    return change


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> FinishedBlocks:
    """The result where client 2 leaves after block 0, which is another than that of all."""

    def leaves(*_: Any) -> bytes:
        raise OSError("the line is dead")

    model, folder = models.tiny_llama(layers=3), tmp_path_factory.mktemp("left")
    dead, replies = by_clients(model, SHARES, folder / "dead", another(leaves))
    assert [r.reason for r in replies if r.status != "ok"] == ["the line is dead"]
    whole, _ = by_clients(model, SHARES, folder / "whole")
    assert any(not torch.equal(dense(whole[n]), dense(dead[n])) for n in dead)
    return dead


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_reply_is_refused_and_others_go_on(kind: str, left: FinishedBlocks, tmp_path: Path) -> None:
    """Nothing of it is in the sums: the rest of the run is as if the device had left after block 0."""
    model = models.tiny_llama(layers=3)
    parts, replies = by_clients(model, SHARES, tmp_path, another(lambda data, _: broken(kind, data)))
    refused = [r for r in replies if r.status == "refused"]
    assert [(r.block, r.client) for r in refused] == [(1, 2)]
    assert WRONG[kind] in refused[0].reason
    assert [r.client for r in replies if r.block == 2] == [0, 5]
    same(parts, left)


SIX = {client: text(2, seed=client) for client in range(6)}


def lie(kind: str, a: np.ndarray, C: int) -> np.ndarray:
    """What a device sends instead of its honest sums `a`."""
    H = from_lower_triangle(torch.from_numpy(a.copy()), C).double()
    squares = H.diagonal()
    if kind == "not positive semidefinite":  # each pair alone could be: two numbers may have any correlation
        H = -0.9 * torch.outer(squares, squares).sqrt()
        H.diagonal().copy_(squares)
    elif kind == "the largest everywhere":
        H = torch.full((C, C), 2 * SIX[0].numel() * federated.LARGEST**2)
    else:  # its spectrum turned over, so many times as large
        values, vectors = torch.linalg.eigh(H)
        H = float(kind) * (vectors * values.flip(0)) @ vectors.T
    return lower_triangle(H).float().numpy()


def lying(kind: str) -> Change:
    """Let client 0 lie about every input of block 0."""

    def spoil(data: bytes, linears: Any) -> bytes:
        message = decode(data)
        arrays = {n: lie(kind, a, linears[n].in_features) for n, a in message.payload.arrays.items()}
        return encode(Message(message.round, message.base, Payload(arrays, message.payload.scalars)))

    return another(spoil, (0, 0))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("not positive semidefinite", "makes it not positive semidefinite"),
        ("the largest everywhere", "times the median of the devices, 4 at most"),
        ("5", "times the median of the devices, 4 at most"),
    ],
)
def test_sums_that_count_for_all_others_are_refused(kind: str, why: str, tmp_path: Path) -> None:
    model = models.tiny_llama()
    parts, replies = by_clients(model, SIX, tmp_path / "lie", lying(kind))
    refused = [r for r in replies if r.status == "refused"]
    assert [(r.block, r.client) for r in refused] == [(0, 0)]
    assert why in refused[0].reason
    others, _ = by_clients(model, {c: SIX[c] for c in range(1, 6)}, tmp_path / "others")
    same(parts, others)


def test_a_lie_within_the_factor_is_heard_and_of_two_devices_the_larger_is_refused(tmp_path: Path) -> None:
    model = models.tiny_llama()
    _, replies = by_clients(model, SIX, tmp_path / "six", lying("3.5"))
    assert {r.status for r in replies} == {"ok"}
    two = {c: SIX[c] for c in range(2)}
    _, replies = by_clients(model, two, tmp_path / "two")
    assert {r.status for r in replies} == {"ok"}
    _, replies = by_clients(model, two, tmp_path / "a liar", lying("1e5"))
    assert {(r.client, r.status) for r in replies} == {(0, "refused"), (1, "ok")}


@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_honest_sums_pass_however_unlike_their_inputs_are(tokens: int) -> None:
    """Fewer tokens than inputs, inputs of 1e-6 to 1e4, one that is always zero and two that are equal."""
    rng = np.random.default_rng(tokens)
    x = (rng.normal(size=(tokens, 200)) * 10.0 ** rng.uniform(-6, 4, 200)).astype(np.float32)
    x[:, 3], x[:, 5] = 0.0, x[:, 4]
    H = torch.from_numpy(2 * x.T @ x)
    found = federated.check_sums("x", lower_triangle(H).numpy(), 200, tokens)
    assert found == pytest.approx((x.astype(float) ** 2).mean(), rel=1e-4)


def test_answers_are_added_in_the_clients_order_whenever_they_come(tmp_path: Path) -> None:
    def backwards(clients: ClientHessians) -> None:
        real = clients._answers
        clients._answers = lambda number, linears: reversed(list(real(number, linears)))  # type: ignore

    model = models.tiny_llama()
    there, replies = by_clients(model, SIX, tmp_path / "there")
    back, again = by_clients(model, SIX, tmp_path / "back", backwards)
    same(there, back)
    assert [(r.block, r.client) for r in again] == [(r.block, r.client) for r in replies]


def test_memory_does_not_grow_with_the_devices(tmp_path: Path) -> None:
    model = models.tiny_llama()
    clients = ClientHessians(model, {i: text(2, seed=i) for i in range(20)}, tmp_path, lambda reply: None)
    with torch.inference_mode():
        clients.hessians(0, linears_of(model)[0][1])
    assert len(clients._stream.states) <= 2
    assert len(list((tmp_path / "devices").iterdir())) == 20


QUICK = ["--limit", "60", "--held-out", "8", "--max-length", "96", "--samples", "0", "--rounds", "1"]
ZO = ["--method", "fedkseed", "--clients", "3", "--set", "tau=2", "--set", "K=16", "--set", "lr=1e-2"]
SMALL = ["--set", "group=8", "--windows", "6", "--length", "32"]


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("run")
    models.tiny_llama().save(at / "tiny")
    assert main(["tune", str(at / "tiny"), "demo", *QUICK, *ZO, "--out", str(at / "runs"), "-qq"]) == 0
    return at / "runs"


def test_a_run_is_calibrated_by_its_clients(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On training rows: every client's first windows of its own, none of the held-out ones."""
    out = ["--out", str(tuned_run)]
    events = ok(capsys, "compress", "latest", *SMALL, "--calibrate", "clients", *out)
    done = events[-1]
    replies = [e for e in events if e["event"] == "client"]
    assert {r["client"] for r in replies} == {0, 1, 2}
    assert done["bytes_up"] == sum(r["bytes_up"] for r in replies)
    assert done["bytes_down"] == sum(r["bytes_down"] for r in replies) > 0
    recipe = finished.recipe_of(tuned_run / "latest")
    parts = prepare.split(recipe, methods.entry(recipe.method))
    model = finished.load(tuned_run / "latest")
    finished.merge_weights(model)
    shares = {}
    for client, rows in enumerate(parts.clients):
        encoded = encode_all([parts.examples[i] for i in rows], model.tokenizer, recipe.max_length)[0]
        shares[client] = driver.windows([row.ids for row in encoded], 32, 2)
    want, _ = by_clients(model, shares, tuned_run / "parts")
    master = Master(Path(done["folder"]) / "model")
    for name in want:
        assert torch.equal(master.weight(name), dense(want[name]))
    events = ok(capsys, "compress", "latest", *SMALL, "--calibrate", "clients", "--clients", "2", *out)
    assert len({e["client"] for e in events if e["event"] == "client"}) == 2


def test_a_stopped_one_counts_what_was_sent_before_and_leaves_out_who_was(tuned_run, capsys, monkeypatch):
    args = ["latest", *SMALL, "--calibrate", "clients", "--out", str(tuned_run)]
    answered, answer = list[int](), ClientHessians.answer  # in block 1

    def fail(self: ClientHessians, client: int, number: int, linears: Any) -> bytes:
        said = b"?" if client == 1 else answer(self, client, number, linears)
        answered.extend([client] * (number == 1))
        return said

    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.console.InterruptHandler", pressed_when(lambda: len(answered) >= 2))
        patch.setattr(ClientHessians, "answer", fail)
        code, first, _ = call_json(capsys, "compress", *args)
    assert code == 130
    (log,) = tuned_run.glob("*/parts/replies.jsonl")
    with log.open("a") as file:
        file.write('{"block": 1, "cl')  # a kill
    second = ok(capsys, "compress", "--resume", "latest", "--out", str(tuned_run))
    before, after = ([e for e in events if e["event"] == "client"] for events in (first, second))
    assert [r["client"] for r in before] == [0, 1, 2, 0, 2]
    assert [r["client"] for r in after] == [0, 2]
    assert second[-1]["bytes_up"] == sum(r["bytes_up"] for r in before + after)
    assert second[-1]["bytes_down"] == sum(r["bytes_down"] for r in before + after)
