# SPDX-License-Identifier: Apache-2.0
"""Pack bytes into Flower's records and sign requests; the same on both sides."""

from __future__ import annotations

import logging
from base64 import b64encode
from typing import Final

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message

from fleetune.errors import MessageError
from fleetune.fleet.keys import PrivateKey

PIECE: Final = 1 << 20  # bytes of an object; each has to arrive within 180 s

# One request for an answer and the next order: `exchange.py` says what these headers mean
EXCHANGE: Final = "/v1/fleet/exchange"
ORDER: Final = "fleetune-order"
NEXT: Final = "fleetune-next"


def hush() -> None:
    """Stop Flower's logging: a line for every request, which it writes by a handler of its own."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def pack(data: bytes, common: int = 0) -> RecordDict:
    """Return the bytes as records of at most `PIECE`; the last `common` bytes begin a record of their own.

    Flower stores equal records of different messages once.  Within a message a number keeps them apart.
    """
    cut = len(data) - common
    starts = sorted({*range(0, max(1, cut), PIECE), *range(cut, len(data), PIECE)})
    ends = [*starts[1:], len(data)]
    return RecordDict(
        {
            str(i): ConfigRecord({"n": i, "data": data[start:end]})
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        }
    )


def unpack(content: RecordDict) -> bytes:
    """Return the bytes of records; MessageError for records of another kind."""
    try:
        parts = [content[str(i)]["data"] for i in range(len(content))]
    except (KeyError, TypeError, IndexError) as error:
        raise MessageError(f"the message is not in pieces as agreed ({error!r})") from error
    if not all(type(part) is bytes for part in parts):
        raise MessageError("the message is not in pieces of bytes")
    return b"".join(parts)  # type: ignore[arg-type]


def signed(key: PrivateKey) -> dict[str, str]:
    """Return the headers by which Flower knows a device: its public key, the time, and the time signed with the key."""
    timestamp = now().isoformat()
    signature = sign_message(key.secret, timestamp.encode())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(key.public.pem).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
    }


def answer_to(message: Message, data: bytes) -> Message:
    """Return a reply with these bytes."""
    reply = Message(pack(data), reply_to=message)
    set_id(reply, reply.object_id)
    return reply


def set_id(message: Message, id: str) -> None:
    """Give a message its number: Flower derives it from the content, and has no public way to set it."""
    message.metadata.__dict__["_message_id"] = id
