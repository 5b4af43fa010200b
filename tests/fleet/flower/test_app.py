"""The app for a Flower that is there already ends in the digest of the simulation, and uses what Flower documents.

Most of it runs in this process, on a grid that calls the ClientApp itself, anew for each message as a SuperNode does;
`make slow` has the same with Flower's own programs.
"""

import ast
import importlib.util
import logging
import secrets
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flower_app import CLIENTS, CONFIG, RECIPE, GridHere, digest_of, run
from flwr.app import ConfigRecord, Context, RecordDict
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

import fleetune
from fleetune.cli.main import main
from fleetune.errors import FleetError, MessageError, RecipeError, UsageError
from fleetune.fleet.flower import client_app, server_app
from fleetune.fleet.link import TOO_LARGE, answer_in
from fleetune.fleet.orders import DeviceReply, Order
from fleetune.fleet.remote import ROOM
from fleetune.tuning.recipe import recipe as recipes

PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}


def supernodes() -> GridHere:
    """SuperNodes with the rows of the clients, as `fleetune fleet split` writes them."""
    own = {"model": "model", "device": "cpu", "threads": 1}
    configs = [{**own, "data": f"rows/client-{c:03d}.jsonl", "state": f"state-{c}"} for c in range(CLIENTS)]
    return GridHere((7, 3, 5), configs)


def test_a_run_over_a_grid_stopped_and_resumed_ends_in_the_digest_of_the_simulation(place, capsys):
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-qq"]) == 0
    values = {**recipes.read(Path("recipe.toml")), "aggregation": "norm-clip"}  # what a fleet takes
    simulated = fleetune.tune(recipes.make(values), out="simulated")
    grid = supernodes()
    grid.errors = list(server_app.LOST)  # the first jobs are lost, and given again
    grid.stop_after = 4 + 2 * CLIENTS + 2  # these, jobs and round 1, and the second order of round 2
    with pytest.raises(KeyboardInterrupt):
        run(grid)
    run(grid, recipe="", resume="latest")
    assert digest_of("real") == simulated.done.digest
    assert main(["fleet", "devices", "latest", "--out", "real"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "edge" in line]
    assert lines == [[str(c), f"edge-{c}"] for c in range(CLIENTS)]


def test_a_run_ends_when_all_supernodes_have_refused(place):
    """Flower's own simulation starts them without rows."""
    why = r"no device can take part: 3 came; .* it was not told which rows"
    with pytest.raises(FleetError, match=why) as ends:
        run(GridHere((7, 3, 5), [{"partition-id": c} for c in range(CLIENTS)]))
    assert ends.value.exit_code == 4


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_what_a_device_answers_when_flower_says_there_is_no_answer(place, monkeypatch, caplog, code):
    """An app that fails is a failed answer, with the reason in the log; what was lost is given again."""
    monkeypatch.setattr(server_app, "log", logging.getLogger("said"))
    grid = supernodes()
    link = server_app.GridLink(grid)  # type: ignore[arg-type]
    (key, *_) = link.online()
    order = Order("work", 3)
    grid.errors = [code]
    number = link.push(key, order.encode(), 0, ROOM)
    assert number is not None
    ((_, data),) = link.pull({number})
    reply = answer_in(data, order)
    assert (reply.what if reply else "") == ("failed" if code <= 2 else "")
    assert ("the ClientApp failed: because" in caplog.text) == (code <= 2)
    assert link.push("unknown", order.encode(), 0, ROOM) is None
    assert (link.name(key), link.name("0123456789")) == ("edge-0", "01234567")


@pytest.mark.parametrize("error", [DecodeError("x"), AttributeError("x"), IndexError("x"), ValueError("x")])
def test_what_flower_cannot_read_is_the_answer_of_its_device_alone(place, monkeypatch, error):
    grid = supernodes()
    link = server_app.GridLink(grid)  # type: ignore[arg-type]
    odd, *others = [link.push(key, Order("work", 3).encode(), 0, ROOM) for key in link.online()]
    pull = grid.pull_messages

    def pulled(numbers):
        if odd in numbers:
            raise error
        return pull(numbers)

    monkeypatch.setattr(grid, "pull_messages", pulled)
    found = dict(link.pull({odd, *others}))
    assert found.pop(odd) == b""
    assert found.keys() == set(others)
    assert all(found.values())


def test_an_answer_beyond_its_room_is_too_large(place):
    link = server_app.GridLink(supernodes())  # type: ignore[arg-type]
    (key, *_) = link.online()
    number = link.push(key, Order("work", 3).encode(), 0, 8)
    assert list(link.pull({number})) == [(number, TOO_LARGE)]


def ask(order: Order, config: dict[str, Any], state: RecordDict | None = None) -> DeviceReply:
    return DeviceReply.decode(
        client_app.answer(order.encode(), Context(0, 5, config, state or RecordDict(), {}))
    )


def test_what_a_device_lacks_is_its_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reply = ask(Order("job"), {})
    assert (reply.what, reply.code) == ("refused", "no-data")
    assert ask(Order("job"), {"data": "rows", "threads": "two"}).what == "refused"
    reply = ask(Order("work", 2), {"data": "rows"})
    assert (reply.what, reply.round, reply.code) == ("failed", 2, "no-job")
    assert (tmp_path / "fleetune-device" / "5" / ".lock").exists()
    bad = RecordDict({client_app.JOB: ConfigRecord({"order": Order("job", body=b"{}").encode()})})
    assert ask(Order("work", 2), {"data": "rows"}, bad).code == "order"
    with pytest.raises(MessageError):
        client_app.answer(b"x", Context(0, 5, {}, RecordDict(), {}))


def test_a_supernode_has_a_budget_and_a_smallest_sum_of_its_own(place: Path) -> None:
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-qq"]) == 0
    grid = supernodes()
    for context in grid.contexts.values():
        context.node_config["smallest-sum"] = 3
    with pytest.raises(FleetError, match="it takes part in secure sums alone, of 3 devices or more"):
        run(grid)
    own = {"data": "rows", "smallest_sum": 4, "epsilon": 8, "delta": 1e-6, "state": "own"}
    brings, _ = client_app.brought(own, 5)
    assert (brings.least, brings.epsilon, brings.delta) == (4, 8, 1e-6)
    with pytest.raises(UsageError, match="needs a folder that keeps the account"):
        client_app.brought({"data": "rows", "epsilon": 8}, 5)
    odd = {"smallest-sum": (-1, 2.5), "epsilon": ("much", float("inf")), "delta": (0,)}
    for name, value in ((name, value) for name, values in odd.items() for value in values):
        with pytest.raises(UsageError, match="a device's budget is such as "):
            client_app.brought(own | {name: value}, 5)


@pytest.mark.parametrize(
    ("config", "error", "what"),
    [
        ({"resume": "latest"}, UsageError, "not both"),
        ({"wait": -1}, UsageError, "negative"),
        ({"recipe": "nowhere.toml"}, RecipeError, "no recipe"),
        ({"recipe": "model =\nx"}, RecipeError, "TOML"),
    ],
)
def test_a_run_config_that_cannot_be(config, error, what):
    with pytest.raises(error, match=what):
        run(supernodes(), **config)


def test_the_app_holds_no_code_of_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fleet", "app", "app"]) == 0
    app = tomllib.loads(Path("app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"].keys() == CONFIG.keys()
    assert server_app.values_from(RECIPE)["set"]["K"] == 16  # the recipe's text, where a path could be
    for part in ("server_app", "client_app"):
        assert app["components"][part.replace("_", "")] == f"fleetune_app.{part}:app"
        text = Path(f"app/fleetune_app/{part}.py").read_text()
        assert text == f"from fleetune.fleet.flower import {part} as installed\n\napp = installed.app\n"
    assert main(["fleet", "app", "app"]) == 2
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == "flwr" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["fleet", "app", "other"]) == 2
    said = capsys.readouterr().err
    assert "there already" in said
    assert "[flower]'" in said


def test_of_flower_only_what_it_documents_is_used():
    """A release of Flower may change the rest at any time."""
    source = Path(fleetune.__file__).parent
    used: set[str] = set()
    for file in (source / "fleet" / "flower").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module or "")
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert own or node.attr == "__version__", f"{file.name}: {ast.unparse(node)}"
    assert {name for name in used if name.partition(".")[0] in ("flwr", "ray")} == PUBLIC


@settings(max_examples=30)
@given(st.integers(0, 3 * 1000), st.integers(0, 3 * 1000), st.integers(1, 1000))
def test_bytes_come_back_whatever_their_length(head, common, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "PIECE", piece)
        data = secrets.token_bytes(head + common)
        packed = client_app.pack(data, common)
        assert client_app.unpack(packed) == data
        assert all(len(record["data"]) <= piece for record in packed.values())


def test_records_of_another_kind_are_refused():
    for name, odd in (("x", {"data": b""}), ("0", {"data": "text"}), ("0", {"n": 1})):
        with pytest.raises(MessageError):
            client_app.unpack(RecordDict({name: ConfigRecord(odd)}))


def test_what_the_orders_of_a_round_end_with_is_one_object_for_all_devices():
    """Flower stores equal objects once."""
    body = secrets.token_bytes(3 << 20)
    orders = [Order("work", 1, 10**c, c, body) for c in range(8)]  # heads of unlike lengths
    packs = [client_app.pack(o.encode(), o.common).values() for o in orders]
    stored = {record.object_id: len(record["data"]) for packed in packs for record in packed}
    assert len(body) < sum(stored.values()) < 1.1 * len(body)
