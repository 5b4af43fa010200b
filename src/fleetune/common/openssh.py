"""Read keys in OpenSSH's form, as `ssh-keygen` makes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetune.errors import FleetuneError, UsageError


def read_key(
    path: Path,
    load: Callable[[bytes], Any],
    kind: type[Any],
    of: str,
    hint: str,
    error: type[FleetuneError] = UsageError,
) -> Any:
    """Return a key that `load` makes of the file, of this kind (`of`: in words); the error, with a hint, where it has none."""
    try:
        key = load(path.read_bytes())
    except OSError as fault:
        raise error(f"cannot read the key {path}: {fault.strerror}", hint=hint) from fault
    except Exception as fault:
        raise error(f"{path} is not an OpenSSH key {of} without a password ({fault})", hint=hint) from fault
    if not isinstance(key, kind):
        raise error(f"{path} is not an OpenSSH key {of}", hint=hint)
    return key
