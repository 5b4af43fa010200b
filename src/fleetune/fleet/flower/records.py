"""Pack bytes into Flower's records; the same on both sides."""

from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fleetune.errors import MessageError

PIECE: Final = 1 << 20  # bytes of a record


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
