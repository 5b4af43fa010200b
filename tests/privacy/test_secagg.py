"""Secure sums: every pattern of drop-outs gives the exact sum or an honest refusal, and no member lays another open."""

import random
from collections.abc import Collection

import numpy as np
import pytest

from fleetune.errors import MessageError
from fleetune.privacy import secagg
from fleetune.privacy.secagg import Party, WrongSharesError, coefficients, polynomial, share, unmask

ATTEMPT = bytes(range(16))
CONTEXT = b"run 1 " + ATTEMPT
NUMBERS = 5


class Sum:
    """A sum in progress, with those of its members that do not drop out before each step."""

    def __init__(self, n: int, least: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.least = least
        self.x = {u: rng.integers(-(1 << 62), 1 << 62, NUMBERS) for u in range(n)}
        self.members = {u: Party(u, least, n, CONTEXT, ATTEMPT) for u in range(n)}
        self.keys = {u: member.keys() for u, member in self.members.items()}
        self.total, self.survivors = np.zeros(NUMBERS, np.uint64), list[int]()
        self.revealed, self.shares = dict[int, dict[int, bytes]](), dict[int, dict[int, bytes]]()

    def share(self, here: Collection[int]) -> None:
        for u in here:
            self.shares[u] = self.members[u].shares({v: self.keys[v] for v in self.keys if v != u})

    def arrived(self, u: int) -> dict[int, bytes]:
        return {v: self.shares[v][u] for v in self.shares if v != u}

    def mask(self, here: Collection[int]) -> None:
        for u in here:
            self.total += self.members[u].masked(self.x[u], self.arrived(u))
            self.survivors.append(u)

    def reveal(self, here: Collection[int]) -> None:
        for u in here:
            self.revealed[u] = self.members[u].reveal(self.survivors)

    def sum(self) -> np.ndarray:
        sent = self.total, self.keys, self.shares, self.survivors, self.revealed
        return unmask(*sent, least=self.least, context=CONTEXT)

    @property
    def wanted(self) -> np.ndarray:
        return np.asarray(sum(self.x[u] for u in self.survivors))


def whole(n: int = 5, least: int = 4, gone: Collection[int] = ()) -> Sum:
    """Return a sum of all but those that are gone after they have shared, with all that is revealed."""
    found, everyone = Sum(n, least), range(n)
    found.share(everyone)
    found.mask([u for u in everyone if u not in gone])
    found.reveal(found.survivors)
    return found


def test_a_thousand_patterns_of_drop_outs_give_the_exact_sum_or_a_refusal():
    rnd, summed = random.Random(1), 0
    for seed in range(1000):
        n = rnd.randint(3, 6)
        least = rnd.randint(-(-2 * n // 3), n)
        drop = [set(rnd.sample(range(n), rnd.randint(0, n // 3))) for _ in range(3)]
        found = Sum(n, least, seed)
        here = [u for u in range(n) if u not in drop[0]]
        try:
            found.share(here)
            found.mask(here := [u for u in here if u not in drop[1]])
            found.reveal(here := [u for u in here if u not in drop[2]])
            total = found.sum()
        except MessageError:
            assert len(here) < least
            continue
        assert len(here) >= least
        np.testing.assert_array_equal(total, found.wanted)
        summed += 1
    assert 300 < summed < 800


@pytest.mark.parametrize("step", ["shares", "masked", "reveal"])
def test_a_third_may_drop_out_before_any_step(step):
    n, gone = 9, {1, 4, 8}
    found = Sum(n, 6)
    here = [u for u in range(n) if u not in gone]
    found.share(here if step == "shares" else range(n))
    found.mask(here if step != "reveal" else range(n))
    found.reveal(here)
    np.testing.assert_array_equal(found.sum(), found.wanted)


def test_what_a_member_sends_says_nothing_without_the_others():
    one, two = Sum(4, 3), Sum(4, 3)
    one.share(range(4))
    two.share(range(4))
    sent = [s.members[0].masked(np.zeros(1 << 14, np.int64), s.arrived(0)) for s in (one, two)]
    assert not (sent[0] == sent[1]).any()  # other keys, other masks
    bits = np.unpackbits(sent[0].view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_fewer_than_t_shares_leave_every_secret_possible():
    secret, t, holders = bytes(31) + b"\1", 3, (0, 4)
    held = {h: share(polynomial(secret, t, CONTEXT), h) for h in (*holders, 7)}
    weights = coefficients((*holders, 7))
    assert sum(w * held[h] for w, h in zip(weights, (*holders, 7), strict=True)) % secagg.P == 1 << 248
    for other in (0, 12345):  # a third share that makes it any other
        known = sum(w * held[h] for w, h in zip(weights, holders, strict=False))
        again = {**held, 7: (other - known) * pow(weights[2], -1, secagg.P) % secagg.P}
        assert sum(w * again[h] for w, h in zip(weights, (*holders, 7), strict=True)) % secagg.P == other


def test_the_prime_is_one_and_above_every_secret():
    assert secagg.P > 1 << 256
    assert all(pow(a, secagg.P - 1, secagg.P) == 1 for a in (2, 3, 5, 7, 11, 13))


def test_a_member_reveals_of_each_one_share_once():
    found = whole(5, 3, gone={4})
    member = found.members[0]
    assert member.reveal([0, 1, 2, 3]) == found.revealed[0]  # the same again, as after a restart
    for others in ([0, 1, 2], [0, 1, 2, 3, 4]):
        with pytest.raises(MessageError, match="other members before"):
            member.reveal(others)


@pytest.mark.parametrize("survivors", [[0], [0, 1], [1, 2, 3], [0, 1, 2, 9]])
def test_a_member_does_not_lay_a_small_or_foreign_sum_open(survivors):
    found = Sum(5, 3)
    found.share(range(5))
    found.mask(range(5))
    with pytest.raises(MessageError, match="members was asked for"):
        found.members[0].reveal(survivors)


def test_a_member_masks_once():
    found = Sum(5, 3)
    found.share(range(5))
    found.mask([0])
    with pytest.raises(MessageError, match="other members"):
        found.members[0].masked(found.x[0], {v: found.shares[v][0] for v in (1, 2, 3)})
    with pytest.raises(MessageError, match="other members"):
        found.members[0].shares({v: found.keys[v] for v in (1, 2)})


def test_a_sum_of_itself_and_one_or_of_twins_is_refused():
    found = Sum(5, 3)
    keys, more = found.keys, {v: Party(v, 3, 5, CONTEXT, ATTEMPT).keys() for v in range(1, 6)}
    twins = ({1: keys[1], 2: keys[1], 3: keys[3]}, {1: keys[1], 2: keys[0], 3: keys[3]})
    few = ({1: keys[1]}, "2 members are none of 3 to 5")
    for others, said in (few, (more, "6 members are none of 3 to 5"), *((each, "twice") for each in twins)):
        with pytest.raises(MessageError, match=said):
            found.members[0].shares(others)


def blamed(found: Sum, said: str) -> int | None:
    """Whom the refusal of a sum, which says this, lays the blame on."""
    with pytest.raises(MessageError, match=said) as error:
        found.sum()
    return error.value.member if isinstance(error.value, WrongSharesError) else None


def test_a_holder_that_lies_is_found_and_left_out():
    found = whole(6, 4, gone={5})
    found.revealed[2] = {v: bytes(secagg.SHARE) for v in found.revealed[2]}
    np.testing.assert_array_equal(found.sum(), found.wanted)


def test_two_holders_that_lie_about_the_others_frame_nobody():
    found = whole(9, 6)
    for liar in (0, 1):
        shares = found.revealed[liar]
        found.revealed[liar] = {v: s if v < 2 else bytes([s[0] ^ 1]) + s[1:] for v, s in shares.items()}
    np.testing.assert_array_equal(found.sum(), found.wanted)


def test_a_holder_that_is_known_to_lie_makes_no_honest_member_named():
    found = whole(7, 6)
    wrong = bytes(secagg.SHARE)
    found.revealed[0] = dict.fromkeys(found.revealed[0], wrong)  # this one is found
    found.revealed[1][5] = wrong  # then too few others are left to tell who lies
    assert blamed(found, "a share of member 5's secrets is wrong") is None


def test_nobody_is_blamed_where_it_cannot_be_told_who_lies():
    found = whole(6, 4, gone={4, 5})
    found.revealed[2] = {v: bytes(secagg.SHARE) for v in found.revealed[2]}
    assert blamed(found, "is wrong") is None


@pytest.mark.parametrize("gone", [(), (1,)])
def test_a_member_whose_shares_do_not_fit_is_named(gone):
    found = Sum(5, 3)
    liar = found.members[1]
    liar.seed, liar.mask = liar.mask, liar.seed  # other secrets than were announced
    found.share(range(5))
    liar.seed, liar.mask = liar.mask, liar.seed
    found.mask([u for u in range(5) if u not in gone])
    found.reveal(found.survivors)
    assert blamed(found, "shares of member 1 do not fit") == 1


def test_shares_that_cannot_be_read_harm_nobody_else():
    found = Sum(6, 4)
    found.share(range(6))
    for v in found.shares[1]:
        found.shares[1][v] = bytes(secagg.SEALED)
    found.mask(range(6))
    found.reveal(range(6))
    assert blamed(found, "shares of member 1 do not fit") == 1
    framed = whole(4, 4)
    del framed.revealed[2][1]  # one that says so alone blames nobody
    assert blamed(framed, "3 shares of member 1 are there") is None
    for u in (2, 3, 4):  # too few are heard to tell who is to blame
        del found.revealed[u]
    assert blamed(found, "shares of member 0 are there") is None


def test_keys_of_small_order_are_refused():
    with pytest.raises(MessageError, match="key is none"):
        secagg.checked_keys(bytes(secagg.KEYS))
    with pytest.raises(MessageError, match="bytes"):
        secagg.checked_keys(b"")
    good = Party(0, 3, 4, CONTEXT, ATTEMPT).keys()
    assert secagg.checked_keys(good) == good
