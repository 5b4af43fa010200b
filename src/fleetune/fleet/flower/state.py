# SPDX-License-Identifier: Apache-2.0
"""Flower's state in memory, with our orders: an order waits in the `Mail` until its device asks, in either protocol.

A node that asks as Flower's own do (`pull-messages`) is given the order as Flower's message; one of ours asks by
`exchange.py`.  Nothing has to be known of a node beforehand, and a pull looks at its own orders alone, where Flower's looks
at every message of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fleetune.fleet.flower import wire
from fleetune.fleet.flower.limits import Uploads
from fleetune.fleet.mail import Letter, Mail

log = logging.getLogger(__name__)

NOT_YET: Final = b"not yet"  # stands for an answer whose objects are still to come
UNREADABLE: Final = b""  # and for one that is none
RAREST: Final = 60.0  # seconds between two heartbeats of a device; ours and Flower's send one in 30 s or less
LIFETIME: Final = 10 * 365 * 86400.0  # seconds that Flower keeps a message: until it is dropped here


class State(InMemoryLinkState):
    """The state of one run; `mail` has the orders of its devices, by the numbers of their nodes."""

    def __init__(self, mail: Mail, uploads: Uploads) -> None:
        super().__init__(NoOpFederationManager(), InMemoryObjectStore())
        self.mail, self.uploads = mail, uploads
        self.run = 0
        self._messages: dict[str, str] = {}  # order -> Flower's number of its message
        self._arriving: dict[str, Message] = {}  # order -> its reply, whose objects are still to come

    def state(self) -> State:
        """Return itself, as Flower's factory of states does."""
        return self

    # Nodes ------------------------------------------------------------------------------------------------

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
        """As Flower's; a request of the node that waits for an order is answered at once."""
        done = super().deactivate_node(node_id)
        self.mail.ring(node_id)
        return done

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """As Flower's; a request of the node that waits for an order is answered at once."""
        if (info := self.nodes.get(node_id)) is not None and info.status == NodeStatus.REGISTERED:
            info.online_until = now().timestamp()  # it was never there: Flower would compare None with a time
        super().delete_node(owner_aid, node_id)
        self.mail.ring(node_id)

    # Flower's own messages --------------------------------------------------------------------------------

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Return the next order for a node as Flower's message, and store its objects."""
        letter = self.mail.take(node_id)
        if letter is None:
            return []
        with self.lock:
            message = self._stored(node_id, letter)
        if message is None:
            self.mail.answer(node_id, letter.number, b"")  # lost: it is given again
            return []
        return [message]

    def _stored(self, node: int, letter: Letter) -> Message | None:
        message = Message(wire.pack(letter.head + letter.tail, len(letter.tail)), node, "train", ttl=LIFETIME)
        wire.set_id(message, message.object_id)
        with no_object_id_recompute():
            session = self.start_session(self.run)
            sent = remove_content_from_message(message)
            stored, missing = self.store_message_and_object_tree(sent, get_object_tree(message), session)
            if not stored:
                return None
            objects = wire.objects_of(message)
            for id in missing:
                self.store_object(self.run, session, id, objects[id].deflate())
        sent.metadata.delivered_at = now().isoformat()
        self._messages[letter.number] = message.metadata.message_id
        self.uploads.expect(message.metadata.message_id, node, letter.room)
        return sent

    def replies(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the answers that have come as Flower's messages, None for one that will not come.

        Flower hands a reply out once, and before its objects are there: it is kept until they are.
        """
        asked = {self._messages[n]: n for n in numbers & self._messages.keys() - self._arriving.keys()}
        if asked:
            for reply in self.get_message_res(set(asked), self.run):
                self._arriving[asked[reply.metadata.reply_to_message_id]] = reply
        for number in sorted(numbers & self._arriving.keys()):
            reply = self._arriving[number]
            if reply.metadata.src_node_id == SUPERLINK_NODE_ID:  # Flower's own: the node is away
                yield number, None
            elif (data := self._arrived(reply.metadata.message_id)) is not NOT_YET:
                yield number, data

    def _arrived(self, id: str) -> bytes | None:
        """Return an answer's bytes, `NOT_YET` while objects are on their way, None where they will not come.

        `UNREADABLE` for objects that are no answer.
        """
        try:
            tree = self.object_store.get_object_tree(id)
            contents: dict[str, Any] = {
                t.object_id: self.get_object(self.run, t.object_id) for t in iterate_object_tree(tree)
            }
            there = {id: content for id, content in contents.items() if content}
            if len(there) < len(contents):
                return NOT_YET
            whole = inflate_object_from_contents(id, there)
            if not isinstance(whole, Message) or whole.has_error():
                return UNREADABLE
            return wire.unpack(whole.content)
        except NoObjectInStoreError:  # it took too long to send them: it is asked again
            return None
        except Exception as error:  # whatever a device makes of its objects
            log.warning("an answer could not be read: %s: %s", type(error).__name__, error)
            return UNREADABLE

    def forget(self, numbers: set[str]) -> None:
        """Delete the messages of orders that nobody waits for any longer."""
        ids = {self._messages.pop(n) for n in numbers & self._messages.keys()}
        self.uploads.forget(ids)
        for number in numbers:
            self._arriving.pop(number, None)
        for id in ids:
            for stored in (id, self.message_ins_id_to_message_res_id.get(id, "")):
                self._cleanup_push_session(
                    self._object_push_session_by_root.get(stored, ""), cleanup_messages=False
                )
                self.object_store.delete(stored)
        self.delete_messages(ids)
