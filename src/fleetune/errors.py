"""Every error that Fleetune raises on purpose, and its exit code; a message says what failed, `hint` what to do next."""

import difflib
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

# what a user's own code may raise: its sys.exit() ends no job of ours
FAULTS: Final = (Exception, SystemExit)
# letters that are no white space, and look like it or like nothing; as in brackets of a regular expression
EMPTY: Final = r"\xad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200d\u2060-\u2064\u2800\u3164\ufeff\uffa0"
REASON: Final = 300  # characters of a reason that goes into a record, a log and on the screen


def cut_reason(text: str) -> str:
    """Return a text from elsewhere in one printable line of at most `REASON` characters."""
    line = " ".join(text[: 4 * REASON].split())
    kept = line if len(line) <= REASON and len(text) <= 4 * REASON else line[: REASON - 3] + "..."
    return re.sub(f"[{EMPTY}]", "?", "".join(letter if letter.isprintable() else "?" for letter in kept))


def fault(error: BaseException) -> str:
    """Return what a user's own code did, in one line: its error, or that it ended the process; and where, as file:line."""
    name, where = type(error).__name__, place_of(error)
    at = f" ({where})" if where else ""
    if not isinstance(error, SystemExit):
        return f"{name}: {error}{at}"
    return f"it ended the process, {name}: {error.code}{at}"


def place_of(error: BaseException) -> str:
    """Return the last line of a user's own code that an error came through, as "objective.py:7"; "" where none is on its way.

    The file has no folders before it: the text goes into records that others see.
    """
    frames = [(Path(f.f_code.co_filename), line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [(path, line) for path, line in frames if not any(map(path.is_relative_to, _NOT_OWN))]
    return f"{own[-1][0].name}:{own[-1][1]}" if own and own[-1][0].is_file() else ""


_NOT_OWN: Final = tuple(
    {Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))}
)


class FleetuneError(Exception):
    """Base of all errors; `message` is what failed, `hint` the next thing to try, which a traceback ends in."""

    exit_code = 1
    spoken: ClassVar[Callable[[str], str]] = str  # a text as Python users read it: `fleetune.api` sets it

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return type(self).spoken(self.message)

    @property
    def hint(self) -> str | None:
        """The next thing to try: a command on the command line, a call in Python."""
        return self._hint and type(self).spoken(self._hint)

    @hint.setter
    def hint(self, hint: str | None) -> None:
        self._hint = hint
        self.__notes__ = [f"try: {self.hint}"] if hint else []

    @property
    def page(self) -> str:
        """The command that shows the section of the docs on this kind of error."""
        return f"fleetune help {type(self).__name__.lower()}"


class UsageError(FleetuneError):
    """The command cannot be carried out as it was given."""

    exit_code = 2


class RecipeError(UsageError):
    """One or more options are wrong; `problems` lists them all."""

    def __init__(self, problems: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n  ".join(problems), hint=hint)
        self.problems = problems


class DataError(UsageError):
    """A data set is missing, malformed or empty."""


class ModelError(UsageError):
    """A model cannot be found, fetched, read or used for this."""


class LedgerError(FleetuneError):
    """A ledger is damaged, or was made on another base model."""


class VersionError(FleetuneError):
    """A file that another version of Fleetune wrote."""

    def __init__(self, file: object) -> None:
        super().__init__(
            f"{file} was written by another version of Fleetune",
            hint="use that version, or make the file again",
        )


class MessageError(FleetuneError):
    """Bytes that are not a payload, or a reply that breaks its agreement.

    The message may repeat what came from elsewhere, so it is cut to `REASON` characters.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(cut_reason(message), hint=hint)


class StorageError(FleetuneError):
    """The disk is full, read-only, or a file of the run is gone."""


class FitError(FleetuneError):
    """The job does not fit the device."""

    exit_code = 3


class FleetError(FleetuneError):
    """The fleet did not answer, or not enough of it did."""

    exit_code = 4


class Interrupted(FleetuneError):
    """Stopped by the user between two steps; nothing that was acknowledged is lost."""

    exit_code = 130


@contextmanager
def as_written() -> Iterator[None]:
    """Let errors of the block speak of commands and options as they are written, on a command line."""
    before, FleetuneError.spoken = FleetuneError.spoken, str
    try:
        yield
    finally:
        FleetuneError.spoken = before


@contextmanager
def called(path: Path, name: object) -> Iterator[None]:
    """Let an error of the block name what the user has named instead of the folder or file that it lies in."""
    try:
        yield
    except FleetuneError as error:
        error.message = error.message.replace(str(path), str(name))
        error.hint = error.hint and error.hint.replace(str(path), str(name))
        error.args = (error.message,)
        raise


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Give " Did you mean 'fedkseed'?" for the known name closest to `name`, or "" when none is close."""
    return f" Did you mean '{near}'?" if (near := closest(name, known, cutoff=cutoff)) else ""


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name closest to `name`, or None when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None
