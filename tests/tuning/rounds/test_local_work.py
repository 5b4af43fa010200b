"""What methods keep on simulated clients: it comes back, a kill loses nothing that counts, and memory stays flat."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.data import Encoded
from fleetune.errors import FitError, MessageError, RecipeError, StorageError
from fleetune.models import tiny_llama
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.fleets import Assignment, Wanted, wanted
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.simulated_fleet import LocalFleet


def test_what_a_client_kept_comes_back_and_is_its_own(tmp_path):
    given = {"seen": np.arange(3), "w/0": np.zeros((2, 2), np.float16), "count": 3, "on": False, "name": "é"}
    memories = Memories(tmp_path / "memories")
    assert memories.of(12) == {}
    memories.keep(12, 1, given)
    memories.keep(3, 1, {})  # nothing kept, nothing written
    assert [p.name for p in memories.folder.iterdir()] == ["client-000012.round-000001.ckpt"]
    for again in (memories, Memories(tmp_path / "memories")):
        back = again.of(12)
        assert set(back) == set(given)
        for name, value in given.items():
            assert np.array_equal(back[name], value)
            assert getattr(back[name], "dtype", type(back[name])) == getattr(value, "dtype", type(value))
        back["seen"] += 1  # may be changed; it counts when it is kept
        assert again.of(12)["seen"].tolist() == [0, 1, 2]
        assert again.of(3) == {}


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=20), st.integers(0, 9))
def test_rewind_and_settle_against_a_dictionary(work, round):
    """After any work in order of rounds: rewinding gives what held at that round, settling changes nothing later."""
    work = sorted(work, key=lambda pair: pair[1])
    memories, at = Memories(), dict[int, int]()
    for client, r in work:
        memories.keep(client, r, {"r": r})
        at |= {client: r} if r <= round else {}
    memories.forget_before(round)
    latest = dict(work)
    assert {c: memories.of(c).get("r") for c in range(4)} == {c: latest.get(c) for c in range(4)}
    again = Memories(memories.folder)  # the folder goes with `memories`
    again.rewind(round)
    assert {c: again.of(c).get("r") for c in range(4)} == {c: at.get(c) for c in range(4)}
    assert len(list(again.folder.iterdir())) == len(at)


def test_a_damaged_file_is_named_and_a_half_written_one_goes(tmp_path):
    memories = Memories(tmp_path)
    memories.keep(1, 1, {"a": 1})
    (tmp_path / ".client-000001.round-000002.ckpt.x.tmp").write_bytes(b"half")
    (path,) = tmp_path.glob("client*")
    path.write_bytes(path.read_bytes()[:-1])
    again = Memories(tmp_path)
    again.rewind(1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(MessageError, match=r"client-000001\.round-000001\.ckpt\) cannot be read"):
        again.of(1)


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Memories(tmp_path / "file").keep(1, 1, {"a": 1})


class Keeper:
    """A method whose clients keep an array and count their rounds; every second reply of client 1 fails late."""

    def __init__(self, size: int) -> None:
        self.size, self.packs = size, False

    def local(self, model: Any, payload: Payload, batches: Any, key: int, memory: dict[str, Any]) -> Payload:
        memory["count"] = memory.get("count", 0) + 1
        memory["big"] = np.zeros(self.size)
        if batches.client == 1 and memory["count"] == 2:
            raise RuntimeError("after it changed its memory")
        return Payload({}, {"count": memory["count"]})


def keeping(method: Any, clients: int = 2) -> LocalFleet:
    rows = [[Encoded(np.arange(3, dtype=np.int32), 1)]] * clients
    return LocalFleet(tiny_llama(), method, rows, 0, 0)


def asked(fleet: LocalFleet, round: int, clients: range) -> Iterator[bytes | None]:
    for answer in fleet.ask(round, clients, encode(Message(round, b"", Payload({}, {})))):
        yield answer.data


def test_a_client_that_fails_keeps_what_it_had_before():
    fleet = keeping(Keeper(1))
    for r in range(1, 4):
        list(asked(fleet, r, range(2)))
    assert [fleet.memories.of(c)["count"] for c in range(2)] == [3, 1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_a_client_without_memory_ends_the_run_as_one_that_does_not_fit(error):
    class Full(Keeper):
        def local(self, *args: Any) -> Payload:
            raise error

    with pytest.raises(FitError, match="client 0 in round 1: not enough memory on 'cpu'"):
        list(asked(keeping(Full(1)), 1, range(2)))


def test_memory_does_not_grow_with_the_clients():
    """1 MB kept on each of 40 clients: the process holds a few of them, not 40."""
    peaks = []
    for _ in range(2):  # of both the lower: a table of the interpreter's own may grow meanwhile, by megabytes
        fleet = keeping(Keeper(131_072), 40)
        tracemalloc.start()
        for r in (1, 2):
            assert all(asked(fleet, r, range(2, 40)))
            fleet.forget_before(r - 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(list(fleet.memories.folder.iterdir())) == 2 * 38
    assert min(peaks) < 8e6


def mixed(percent: int) -> Wanted:
    return wanted(methods.make("fedkseed", {"backprop": percent / 100}), "")


@settings(max_examples=30)
@given(st.integers(1, 100), st.integers(1, 60))
def test_where_all_can_do_all_each_does_what_is_wanted(percent, count):
    kinds = mixed(percent)
    assignment = Assignment(kinds)
    assert [assignment.next((0, 1)) for _ in range(count)] == [kinds.of(c) for c in range(count)]


@settings(max_examples=40)
@given(st.integers(1, 99), st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_the_share_is_not_passed_and_is_reached_as_soon_as_devices_can(percent, able, restart):
    """An assignment that goes on from what was given, as after a restart of the server, gives the same."""
    kinds, given = mixed(percent), list[int]()
    assignment = Assignment(kinds)
    for place, both in enumerate(able):
        if place == restart:
            assignment = Assignment(kinds, given)
        given.append(assignment.next((0, 1) if both else (0,)))
        most = sum(kinds.of(c) for c in range(place + 1))
        assert sum(given) <= most
        assert given[-1] <= both
        assert sum(given) == most or not both or given[-1] == 1


def test_a_list_is_repeated_over_the_clients():
    method = methods.make("fedkseed", {"backprop": 0.5})
    assert [wanted(method, "0, 1,1").of(c) for c in range(7)] == [0, 1, 1, 0, 1, 1, 0]
    assert [wanted(method, "").of(c) for c in range(4)] == [0, 1, 0, 1]
    assert wanted(method, "").names == ("two-point steps", "back-propagation")
    ranks = methods.make("fedit", {"average": "product", "ranks": "2,8"})
    assert wanted(ranks, "").names == ["rank 2", "rank 8"]
    assert [wanted(ranks, "").of(c) for c in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("method", "values", "kinds", "problem"),
    [
        ("mezo", {}, "0", "all clients are of one kind"),
        ("fedkseed", {}, "0,1", "all clients are of one kind"),
        ("fedkseed", {"backprop": 0.5}, "0,2", "as 0,1"),
        ("fedkseed", {"backprop": 0.5}, "0,,1", "as 0,1"),
        ("fedkseed", {"backprop": 0.5}, "two", "as 0,1"),
        ("fedkseed", {"backprop": 0.5}, "0, 1,1", ""),
    ],
)
def test_a_list_that_cannot_be_is_refused(method, values, kinds, problem):
    recipe = recipes.make({"model": "m", "data": "d", "method": method, "set": values, "kinds": kinds})
    if not problem:
        prepare.check(recipe)
        return
    with pytest.raises(RecipeError, match=problem):
        prepare.check(recipe)
