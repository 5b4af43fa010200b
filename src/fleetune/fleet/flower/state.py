# SPDX-License-Identifier: Apache-2.0
"""Flower's table of devices in memory: who is there, by heartbeats.  What is on its way to one that goes is lost."""

from __future__ import annotations

from typing import Final

from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fleetune.fleet.mail import Mail

RAREST: Final = 60.0  # seconds between two heartbeats of a device; ours send one in 10 s


class State(InMemoryLinkState):
    """The devices of one run; `mail` has their orders, by the numbers of their nodes."""

    def __init__(self, mail: Mail) -> None:
        super().__init__(NoOpFederationManager(), InMemoryObjectStore())
        self.mail = mail

    def state(self) -> State:
        """Return itself, as Flower's factory of states does."""
        return self

    def alive(self, node: int) -> bool:
        """Note that a node is there; False for one that this server has not seen come in."""
        info = self.nodes.get(node)
        if info is None or info.status == NodeStatus.REGISTERED:
            return False
        return self.acknowledge_node_heartbeat(node, info.heartbeat_interval)

    def is_online(self, node: int) -> bool:
        """Whether a node is there now."""
        return (info := self.nodes.get(node)) is not None and info.status == NodeStatus.ONLINE

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """As Flower's; what the node was ordered before it came in is lost."""
        if done := super().activate_node(node_id, min(heartbeat_interval, RAREST)):
            self.mail.lose(node_id)
        return done

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """As Flower's; a device that has gone is known to have after two intervals, however long it says these are."""
        return super().acknowledge_node_heartbeat(node_id, min(heartbeat_interval, RAREST))

    def deactivate_node(self, node_id: int) -> bool:
        """As Flower's; what the node was ordered is lost, and its request that waits for an order is answered at once."""
        if done := super().deactivate_node(node_id):
            self.mail.lose(node_id)
        self.mail.ring(node_id)
        return done

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """As Flower's; a request of the node that waits for an order is answered at once."""
        if (info := self.nodes.get(node_id)) is not None and info.status == NodeStatus.REGISTERED:
            info.online_until = now().timestamp()  # it was never there: Flower would compare None with a time
        super().delete_node(owner_aid, node_id)
        self.mail.ring(node_id)
