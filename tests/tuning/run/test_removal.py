"""A client is left out of a ledger exactly; replies that were changed, cut or left over are found; what cannot be is refused."""

import dataclasses
import shutil
import stat
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import command_line
import fleetune
from fleetune.cli.main import main
from fleetune.errors import LedgerError, RecipeError, UsageError
from fleetune.runs.rundir import RunDir, replies_file
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.ledger import Ledger
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule, Spool
from fleetune.tuning.methods import Reply
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.replies import Replies, stored
from fleetune.tuning.run import removal
from fleetune.tuning.run.removal import without_client

FEW: dict[str, Any] = command_line.FEW | {"clients": 4, "rounds": 3, "client_rows": 0, "keep_replies": True}
FEW |= {"limit": 40, "max_length": 64}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fedkseed": ("fedkseed", {"K": 16, "tau": 3, "lr": 1e-3}, {}),
    "pro": ("fedkseed", {"K": 16, "tau": 3, "lr": 1e-3, "pro": True}, {}),
    "onebyte": ("onebyte", {"K": 16, "directions": 4, "lr": 1e-3}, {}),
    "mezo": ("mezo", {"tau": 3, "lr": 1e-3, "decay": 8}, {"participation": 0.25, "rounds": 5}),
    "median": ("mezo", {"tau": 3, "lr": 1e-3}, {"aggregation": "median"}),
    "norm-clip": ("fedkseed", {"K": 16, "tau": 3, "lr": 1e-3}, {"aggregation": "norm-clip"}),
    "best": ("mezo", {"tau": 3, "lr": 1e-2}, {"keep": "best", "rounds": 4}),
    "quorum": ("mezo", {"tau": 3, "lr": 1e-3}, {"quorum": 2, "drop": 0.4, "rounds": 4}),
    "signlora": ("signlora", {"steps": 2, "r": 1, "pool": 2}, {}),
}


def tuned(tiny: str, out: Path, case: str, **more: Any) -> fleetune.TuneResult:
    method, settings, given = CASES[case]
    return fleetune.tune(tiny, "demo", method=method, settings=settings, out=str(out), **FEW | given | more)


def entries(ledger: Ledger) -> list[bytes]:
    return [array.tobytes() for array in (ledger.ids, ledger.coefficients, ledger.rounds, ledger.signs)]


@pytest.mark.parametrize("case", CASES)
def test_the_ledger_is_what_the_method_makes_of_the_others(case, tiny, tmp_path, monkeypatch):
    """By hand: the states and replies that the method got in the run, with a ledger and an error of rounding of our own."""
    cls = methods.module_of(CASES[case][0]).Method
    aggregate, seen = cls.aggregate, dict[int, tuple[Any, Any, list[Reply]]]()

    def noted(self: Any, state: Any, replies: Iterable[Reply], rule: Rule = MEAN) -> Any:
        seen[state.round + 1] = self, state, (taken := list(replies))
        return aggregate(self, state, iter(taken), rule)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "aggregate", noted)
        done = tuned(tiny, tmp_path / "runs", case)
    whole = done.ledger()
    last, counts = whole.last_round(), [r.client for _, _, replies in seen.values() for r in replies]
    client = max(counts, key=counts.count)
    hand = seen[1][1]
    quorum, rule = CASES[case][2].get("quorum", 1), Rule(CASES[case][2].get("aggregation", "mean"))
    for r in range(1, last + 1):
        method, state, replies = seen[r]
        others = [reply for reply in replies if reply.client != client]
        own = {name: getattr(hand, name) for name in ("ledger", "left") if hasattr(hand, name)}
        with closing(Spool(tmp_path)) as spool:
            by = dataclasses.replace(rule, spool=spool)
            hand = aggregate(method, state._replace(**own), others if len(others) >= quorum else [], by)
    to, folder = tmp_path / "without.safetensors", str(done.folder)
    assert main(["ledger", "drop", folder, "--device", str(client), "--to", str(to), "-q", "--offline"]) == 0
    made = ledgers.load(to)
    assert entries(made) == entries(hand.ledger)
    assert (made.head.previous, made.head.checks) == (whole.fingerprint(), {})
    assert dataclasses.replace(made.head, previous="") == dataclasses.replace(whole.head, checks={})
    assert entries(made) != entries(whole)
    assert (last < done.done.rounds) == (case == "best")
    for file in (done.folder / "checkpoints").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.fixture(scope="module")
def kept(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> fleetune.TuneResult:
    return tuned(tiny, tmp_path_factory.mktemp("kept"), "mezo", participation=0.5)


def test_a_changed_reply_is_found(kept, tmp_path):
    whole, run = kept.ledger(), Path(shutil.copytree(kept.folder, tmp_path / "run"))
    without_client(run, 0, whole)
    file, draw = replies_file(run, 2), np.random.default_rng(3)
    good = file.read_bytes()
    places = [*range(8), *draw.integers(8, len(good), 60).tolist()]
    first = 8 + int.from_bytes(good[:8], "little")
    swapped = replies_file(run, 1).read_bytes()
    flipped = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in places]
    for changed in (*flipped, good[:-1], good[first:], good + good[:first], b"", swapped):
        file.write_bytes(changed)
        with pytest.raises(LedgerError, match=r"cannot be read|do not give its ledger"):
            without_client(run, 0, whole)
    file.unlink()
    with pytest.raises(LedgerError, match=r"cannot be read .*replies-000002"):
        without_client(run, 0, whole)
    file.write_bytes(good)
    assert entries(without_client(run, 0, whole)) == entries(without_client(kept.folder, 0, whole))


@pytest.mark.parametrize(("cls", "after"), [(Replies, "keep"), (RunDir, "checkpoint")])
def test_a_killed_run_has_the_rounds_that_count(cls, after, kept, tiny, tmp_path, monkeypatch):
    """Killed after round 3 is stored, before or after its checkpoint; its replies are as a whole run has them."""
    write = getattr(cls, after)

    def killed(self: Any, *what: Any) -> None:
        write(self, *what)
        if 3 in what or (isinstance(self, Replies) and self.round.number == 3):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cls, after, killed)
        tuned(tiny, tmp_path, "mezo", participation=0.5)
    run = next(tmp_path.glob("0001-*"))
    extra = replies_file(run, 9)  # of a disk that kept what was to go
    shutil.copy(replies_file(run, 3), extra)
    cut, seen = RunDir.cut, list[int]()

    def looked(self: RunDir, round: int, size: int | None = None) -> list[str]:
        lost = cut(self, round, size)
        seen.extend(r for r in range(1, 10) if replies_file(self.path, r).exists())
        return lost

    monkeypatch.setattr(RunDir, "cut", looked)
    done = fleetune.resume_run(run)
    assert seen == ([1, 2] if after == "keep" else [1, 2, 3])
    assert not extra.exists()
    for r in range(1, 4):
        assert replies_file(run, r).stat().st_size
        pairs = zip(stored(run, r), stored(kept.folder, r), strict=True)
        assert all((a.client, a.key) == (b.client, b.key) for a, b in pairs)
    left = [without_client(f, 1, of.ledger()) for f, of in ((run, done), (kept.folder, kept))]
    assert entries(left[0]) == entries(left[1])


@pytest.mark.parametrize(
    "changed",
    [{"method": "fedit"}, *({"privacy": p, "epsilon": 8.0} for p in ("client", "example", "sealed"))],
)
def test_what_cannot_keep_replies_is_refused(changed):
    given = {"model": "m", "data": "demo", "method": "mezo", "keep_replies": True, **changed}
    said = "keep_replies needs a method that leaves a ledger, and privacy = none"
    with pytest.raises(RecipeError, match=said):
        prepare.check(recipes.make(given))


def test_a_client_is_named_by_its_name_or_number(kept, monkeypatch):
    events = [{"event": "start", "names": ["north", "3", "south"]}]
    monkeypatch.setattr(removal.rundir, "events", lambda run: iter(events))
    known = {"north": (0, "north"), "2": (2, "south"), "3": (1, "3"), "9": (9, "")}
    assert {text: removal.client_of(kept.folder, text) for text in known} == known
    with pytest.raises(UsageError, match="has no client 'west'") as refused:
        removal.client_of(kept.folder, "west")
    assert refused.value.hint == "its clients: 0 north, 1 3, 2 south"


def test_what_cannot_be_removed_is_refused(kept, tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="counted no reply of client 7") as none:
        without_client(kept.folder, 7, kept.ledger())
    assert "0, 1, 2, 3" in str(none.value.hint)
    plain = tuned(tiny, tmp_path, "mezo", keep_replies=False, rounds=1)
    assert not list(plain.folder.glob("checkpoints/replies-*"))
    with pytest.raises(UsageError, match="has kept no replies"):
        without_client(plain.folder, 0, plain.ledger())
    alone = str(shutil.copy(plain.path, tmp_path / "alone.safetensors"))
    for words in (["drop", alone, "--client", "0"], ["scale", alone, "--client", "0"]):
        assert main(["ledger", *words, "--to", str(tmp_path / "to"), "-q"]) == 2
    monkeypatch.setattr(methods.module_of("mezo").Method, "replies_by", None)
    with pytest.raises(UsageError, match="does not state `replies_by`"):
        without_client(kept.folder, 0, kept.ledger())
