"""Give a device all that it needs in one file: the server's address, the ca.pem that it trusts, and its private key.

NAME.invite is JSON: {"v": 1, "address": HOST:PORT, "ca": PEM or "", "key": OpenSSH}.  Whoever reads it can be that device.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import PRIVATE, read_bytes, regular_private, storage_error, write_atomic
from fleetune.errors import UsageError
from fleetune.fleet import keys

SUFFIX: Final = ".invite"
LONGEST: Final = 1 << 16  # bytes
ANEW: Final = "get a new one: fleetune fleet invite NAME, on the server"


def make(file: Path, folder: Path, address: str, ca: Path | None) -> str:
    """Write a new device's invite, and its public key into a folder; return the text.  UsageError: nothing is replaced."""
    name = file.name.removesuffix(SUFFIX)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"'{name}' is no name of a device", hint="letters, digits, dots, - and _")
    public = folder / f"{name}.pub"
    for path in (file, public):
        if path.exists():
            raise UsageError(f"{path} is there already", hint="take another name; an invite replaces nothing")
    own, theirs = keys.generated()
    trusted = ca.read_text(encoding="ascii") if ca is not None else ""
    text = json.dumps({"v": 1, "address": address, "ca": trusted, "key": own.decode()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="ascii", opener=regular_private) as opened:
            opened.write(text)
        write_atomic(public, theirs + f" {name}\n".encode())
    except OSError as error:
        raise storage_error(error, file) from error
    return text


def accept(file: Path, state: Path) -> tuple[str, Path | None]:
    """Bring an invite's key and ca.pem into a device's state folder; return the server's address, and where ca.pem is.

    UsageError, with nothing written, for what is no invite, and where the folder has another key or ca.pem.
    """
    found = _read(file)
    wanted = {state / "key": found["key"], **({state / "ca.pem": found["ca"]} if found["ca"] else {})}
    there = {path for path in wanted if path.exists()}
    for path in there:
        if read_bytes(path) != wanted[path].encode():
            raise UsageError(
                f"{path} is not that of {file}, and is not replaced",
                hint="another folder for this device: --state DIR",
            )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in wanted.keys() - there:
        write_atomic(path, wanted[path], mode=PRIVATE)
    return found["address"], state / "ca.pem" if found["ca"] else None


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LONGEST:
            raise ValueError("it is too long")
        found = json.loads(read_bytes(file))
        if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != FIELDS:
            raise ValueError(f"it has not the fields {', '.join(FIELDS)}")
        keys.check_parts(found["key"].encode(), found["ca"].encode())
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint=ANEW) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no invite of a fleet: {error}", hint=ANEW) from error
    return found


FIELDS: Final = {"v": int, "address": str, "ca": str, "key": str}


def drawn(dark: Sequence[Sequence[int]]) -> str:
    """Return a QR code, whose modules are dark or not, as text: two rows a line, light ones lit."""
    rows = [*dark, *([[0] * len(dark[0])] if len(dark) % 2 else [])]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return (
        "\n".join(
            "".join("█▀▄ "[2 * bool(a) + bool(b)] for a, b in zip(*pair, strict=True)) for pair in pairs
        )
        + "\n"
    )


def code_of(text: str) -> str:
    """Return a text as a QR code, "" where segno is not installed."""
    with contextlib.suppress(ImportError):
        import segno

        return drawn([list(row) for row in segno.make(text, error="l", micro=False).matrix_iter(border=2)])
    return ""
