"""A node of a simulation is the client of its partition's number: the same rows, and a run with the same digest."""

from pathlib import Path

import pytest
from flower_app import CLIENTS, RECIPE, GridHere, digest_of, run
from flwr.app import Context, Message, RecordDict

import fleetune
from fleetune.errors import UsageError
from fleetune.fleet.flower import client_app
from fleetune.fleet.orders import Declined
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes


def nodes(numbers: list[int]) -> GridHere:
    """Nodes of Flower's simulation, as it makes them: numbers at random, each with a partition."""
    return GridHere(numbers, [{"partition-id": p, "num-partitions": CLIENTS} for p in (2, 0, 1)])


@pytest.mark.parametrize("division", ["iid", "dirichlet:0.5:kind", "column:kind"])
def test_a_partition_has_the_rows_of_the_client_with_its_number(place, division):
    recipe = recipes.make({**recipes.read(Path("recipe.toml")), "partition": division})
    Path("run").mkdir()
    Path("run/run.toml").write_text(recipes.to_toml(recipe))
    parts = prepare.split(recipe, methods.entry("fedkseed"))
    clients = client_app.Clients(Path("run"))
    for c, part in enumerate(parts.clients):
        training, held = clients.worker(c).brings.divided()
        assert training == [parts.examples[i] for i in part.tolist()]
        assert held == []
    assert sum(map(len, parts.clients)) == 26
    with pytest.raises(Declined):
        clients.rows(CLIENTS)


def test_a_simulation_stopped_and_resumed_ends_in_the_digest_of_tune(place, monkeypatch):
    """SCAFFOLD remembers something of every client; the resumed simulation has other nodes and processes."""
    head, _, _ = RECIPE.replace('"fedkseed"', '"fedit"').partition("[set]")
    Path("recipe.toml").write_text(f"{head}[set]\nscaffold = true\nlr = 1e-3\n")
    simulated = fleetune.tune(recipes.make(recipes.read(Path("recipe.toml"))), out="simulated")
    loads = []
    load = fleetune.models.load
    monkeypatch.setattr("fleetune.models.load", lambda *a, **k: loads.append(a) or load(*a, **k))
    grid = nodes([7, 3, 5])
    grid.stop_after = 3 + 3 + 3 + 2  # who they are, jobs, round 1, and the second order of round 2
    with pytest.raises(KeyboardInterrupt):
        run(grid, simulate=True)
    assert len(loads) == 2  # the ServerApp's model, and one for all clients of this process
    client_app.clients.cache_clear()
    run(nodes([2, 9, 1]), simulate=True, recipe="", resume="latest")
    assert digest_of("real") == simulated.done.digest


@pytest.mark.parametrize(
    ("values", "partitions", "error"),
    [
        ({"drop": 0.5}, [0, 1, 2], "drop"),
        ({}, [0, 1, 2, 3], "4 SuperNodes, and the recipe 3 clients"),
        ({}, [0, 1, 1], "of 3 SuperNodes 2 are clients"),
        ({}, [0, 1, None], "of 3 SuperNodes 2 are clients"),
    ],
)
def test_a_simulation_that_cannot_be(place, values, partitions, error):
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    Path("recipe.toml").write_text(text + RECIPE)
    configs = [{} if p is None else {"partition-id": p} for p in partitions]
    with pytest.raises(UsageError, match=error):
        run(GridHere(range(1, 1 + len(configs)), configs), simulate=True)


def test_a_server_cannot_make_a_device_with_rows_a_client_of_its_choice(place):
    context = Context(0, 1, {"partition-id": 0, "data": "mine.jsonl"}, RecordDict(), {})
    with pytest.raises(Declined):
        client_app.number_of(context.node_config)
    grid = GridHere([1], [context.node_config])
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1, "query")], 1.0)
    assert not reply.content
    assert client_app.RUN not in grid.contexts[1].state
