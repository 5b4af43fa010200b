# SPDX-License-Identifier: Apache-2.0
"""Bytes through Flower's records and its store: they come back, and what many orders end with is stored once."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import MessageError
from fleetune.fleet import keys
from fleetune.fleet.orders import Order
from fleetune.fleet.remote import ROOM

flower = pytest.importorskip("fleetune.fleet.flower.wire")


@settings(max_examples=30)
@given(st.integers(0, 3 * 1000), st.integers(0, 3 * 1000), st.integers(1, 1000))
def test_bytes_come_back_whatever_their_length(head: int, common: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flower, "PIECE", piece)
        data = secrets.token_bytes(head + common)
        packed = flower.pack(data, common)
        assert flower.unpack(packed) == data
        assert all(len(record["data"]) <= piece for record in packed.values())


def test_records_of_another_kind_are_refused() -> None:
    from flwr.app import ConfigRecord, RecordDict

    for odd in (
        {"x": ConfigRecord({"data": b""})},
        {"0": ConfigRecord({"data": "text"})},
        {"0": ConfigRecord({"n": 1})},
    ):
        with pytest.raises(MessageError):
            flower.unpack(RecordDict(odd))


def test_the_message_of_a_round_is_stored_once_for_all_devices(tmp_path: Path) -> None:
    from fleetune.fleet.flower.gate import Address, Gate

    devices = [keys.make(tmp_path / f"dev-{c}").public for c in range(8)]
    gate = Gate(Address("127.0.0.1", 0), devices)
    gate.open()
    try:
        for key in devices:
            gate.state.activate_node(gate.state.get_node_id_by_public_key(key.pem), 30.0)
        assert len(gate.online()) == 8
        body = secrets.token_bytes(3 << 20)
        orders = [Order("work", 1, 10**c, c, body) for c in range(8)]  # heads of unlike lengths
        numbers = {
            gate.push(k.fingerprint, o.encode(), o.common, ROOM) for k, o in zip(devices, orders, strict=True)
        }
        for key in devices:  # as Flower's own nodes would
            assert gate.state.get_message_ins(gate.state.get_node_id_by_public_key(key.pem), 1)
        stored = sum(len(entry.content) for entry in gate.state.object_store.store.values())
        assert len(body) < stored < 1.1 * len(body)
        gate.drop({n for n in numbers if n})
        assert not gate.state.object_store.store
    finally:
        gate.close()
