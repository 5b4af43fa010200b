# SPDX-License-Identifier: Apache-2.0
"""Bytes through Flower's records: they come back, and what many orders end with is one object."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import MessageError
from fleetune.fleet.orders import Order

records = pytest.importorskip("fleetune.fleet.flower.records")


@settings(max_examples=30)
@given(st.integers(0, 3 * 1000), st.integers(0, 3 * 1000), st.integers(1, 1000))
def test_bytes_come_back_whatever_their_length(head: int, common: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        data = secrets.token_bytes(head + common)
        packed = records.pack(data, common)
        assert records.unpack(packed) == data
        assert all(len(record["data"]) <= piece for record in packed.values())


def test_records_of_another_kind_are_refused() -> None:
    from flwr.app import ConfigRecord, RecordDict

    for odd in (
        {"x": ConfigRecord({"data": b""})},
        {"0": ConfigRecord({"data": "text"})},
        {"0": ConfigRecord({"n": 1})},
    ):
        with pytest.raises(MessageError):
            records.unpack(RecordDict(odd))


def test_what_the_orders_of_a_round_end_with_is_one_object_for_all_devices() -> None:
    """Flower stores equal objects once."""
    body = secrets.token_bytes(3 << 20)
    orders = [Order("work", 1, 10**c, c, body) for c in range(8)]  # heads of unlike lengths
    packs = [records.pack(o.encode(), o.common).values() for o in orders]
    stored = {record.object_id: len(record["data"]) for packed in packs for record in packed}
    assert len(body) < sum(stored.values()) < 1.1 * len(body)
