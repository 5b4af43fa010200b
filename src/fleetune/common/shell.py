"""Write a command so that it can be pasted into a shell, and so that no word of it drives the terminal."""

import importlib.util
import shlex

from fleetune.errors import UsageError


def quoted(word: object) -> str:
    """Return one word of a command, in quotes where a shell would split or expand it."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return "\\" + letter if letter in "\\'" else letter
    code = ord(letter)
    if letter == "\n":
        return r"\n"
    if code < 0x80 or 0xDC80 <= code < 0xDD00:  # ASCII, or a byte of a name that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\U{code:08x}"


def command(*words: object) -> str:
    """Return `fleetune WORD ..`, each word quoted where it needs to be."""
    return " ".join(["fleetune", *map(quoted, words)])


def pip_install(extra: str = "") -> str:
    """Return the command that installs Fleetune with an extra (none for "")."""
    return f"pip install {quoted(f'fleetune[{extra}]' if extra else 'fleetune')}"


def check_installed(what: str, extra: str, *packages: str) -> None:
    """UsageError where one of the packages, which come with an extra and are needed for `what`, is not there."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{what} needs {name}, which is not installed", hint=pip_install(extra))
