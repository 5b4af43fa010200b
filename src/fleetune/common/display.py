"""Format numbers and measures for people, and make words of others and commands safe to show."""

import importlib.util
import math
import re
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from fleetune.common.paired import within_noise
from fleetune.errors import EMPTY, UsageError

SAME = 1e-7  # relative: float noise of a measure, since kernels differ by less
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PADDING = rf"[{EMPTY}](?=[\s{EMPTY}])|(?<=[\s{EMPTY}])[{EMPTY}]"  # such a letter in a run of blanks
_FOREIGN = re.compile(
    rf"\n(?!  )|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|{_PADDING}"
)
_BREAK = re.compile(rf"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|{_PADDING}")
_BLANKS = re.compile(rf"(?<=[^\s{EMPTY}\ufe00-\ufe0f])(?:[^\S\n]|[{EMPTY}\ufe00-\ufe0f]){{2,}}")


def clean(text: str) -> str:
    """Return `text` without control characters and marks of direction (newline and tab stay)."""
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Return a name as it can stand in a line or a table: line ends, tabs, control characters and padding as escapes (`\\n`)."""
    return _BREAK.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def single_spaced(text: str) -> str:
    """Return a text whose runs of blanks are one: else a padded one fills a line, and seems to begin another."""
    return _BLANKS.sub(" ", text).strip()


def message_text(text: str) -> str:
    """Return a message with its own line breaks, which two spaces follow, and all else that drives a terminal as escapes.

    So the name of a file in it can neither colour the screen nor begin a line of its own.
    """
    return _FOREIGN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def human_bytes(count: float | None) -> str:
    """Format bytes in decimal units with about three digits: 260 B, 16.4 kB, 2.8 MB, 1.19 GB; "-" for None."""
    if count is None or not math.isfinite(count):
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    if units[0] == "B":
        return f"{value:.0f} B"
    digits = _digits(value)
    if units[0] in {"kB", "MB"}:
        digits = min(digits, 1)
    return f"{value:.{digits}f} {units[0]}"


def human_time(seconds: float | None) -> str:
    """Format seconds as 3.2 s, 42 s, 2m04s, 1h07m or 2d03h; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def human_count(count: float | None) -> str:
    """Format a count: 4,096 below 100,000, else three digits with k, M, B or T (135 M, 1.24 B); "-" for None."""
    if count is None or not math.isfinite(count):
        return "-"
    if abs(count) < 99_999.5:
        return f"{count:,.0f}"
    value, units = count / 1000, ["k", "M", "B", "T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.{_digits(value)}f} {units[0]}"


def counted(count: object, word: str, plural: str = "") -> str:
    """Return a count with its noun: "1 round", "24 clients", "2 matrices" where `plural` is given."""
    shown = f"{count:,}" if isinstance(count, int) else str(count)
    return f"{shown} {word if count == 1 else plural or word + 's'}"


def are(count: int, word: str) -> str:
    """Return a count with its noun and verb: "1 tensor is", "5 tensors are"."""
    return f"{counted(count, word)} {'is' if count == 1 else 'are'}"


def _digits(value: float) -> int:
    if abs(value) >= 99.95:
        return 0
    return 1 if abs(value) >= 9.995 else 2


class Metric(NamedTuple):
    """The display of a measure: its label, decimals, whether less is better, whether change is in percent."""

    label: str
    digits: int = 3
    less: bool = False
    relative: bool = False


_METRICS = {
    "loss": Metric("validation loss", 3, less=True, relative=True),
    "perplexity": Metric("perplexity", 2, less=True, relative=True),
    "other_perplexity": Metric("perplexity, other text", 2, less=True, relative=True),
    "rouge_l": Metric("Rouge-L", 1),
    "accuracy": Metric("accuracy, %", 1),
    "kl_divergence": Metric("KL divergence", 4, less=True),
    "same_top": Metric("same top token, %", 1),
    "objective": Metric("objective (less is better)", 4, less=True),
}


COMPARED = ("kl_divergence", "same_top")  # with a reference model; each has a standard error


def metric(name: str) -> Metric:
    """Return the display of the measure called `name` in metrics.jsonl and eval.json."""
    if name in _METRICS:
        return _METRICS[name]
    less = "loss" in name or "perplexity" in name
    return Metric(clean(name).replace("_", " "), less=less, relative=less)


def show(name: str, value: float | None) -> str:
    """Format a value with its measure's decimals; "-" for None."""
    return "-" if value is None else f"{value:.{metric(name).digits}f}"


def show_with_error(name: str, value: float, error: float | None) -> str:
    """Format a value with its standard error: "0.0778 ± 0.0024"."""
    if error is None:
        return show(name, value)
    digits = _visible(error, metric(name).digits)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _visible(error: float, digits: int) -> int:
    """Return as many decimals as an error needs to be seen, `digits` at least and two more at most."""
    if not error:
        return digits
    return next((d for d in (digits, digits + 1) if error >= 0.5 * 10.0**-d), digits + 2)


def changes(base: Mapping[str, float | None], tuned: Mapping[str, float | None]) -> list[str]:
    """Say how each measure of a run changed: "loss 4.477 -> 3.354"."""
    return [f"{name} {show(name, base.get(name))} -> {show(name, value)}" for name, value in tuned.items()]


def change(name: str, base: float | None, tuned: float | None, error: float | None = None) -> str:
    """Format tuned against base: in percent for losses ("-18.4 %"), in the measure's own unit else ("+12.3").

    With the standard `error` of the difference, "-18.4 ± 1.2 %".  A loss that begins below 0 has no percentage, and is shown
    in its own unit as well.
    """
    if base is None or tuned is None or not (math.isfinite(base) and math.isfinite(tuned)):
        return ""
    error = None if math.isclose(base, tuned, rel_tol=SAME) else error
    scale, digits, unit = 1.0, metric(name).digits, ""
    if metric(name).relative and base >= 0:
        if base == 0:
            return ""
        scale, digits, unit = 100 / base, 1, " %"
    digits = _visible(scale * (error or 0.0), digits)
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * (tuned - base):+.{digits}f}{spread}{unit}"


def improved(name: str, base: float | None, tuned: float | None, error: float | None = None) -> bool | None:
    """Return whether tuned is better than base; None when that cannot be said.

    That is where they are equal but for float noise, or differ by no more than two standard `error`s of the difference.
    """
    if base is None or tuned is None or not (math.isfinite(base) and math.isfinite(tuned)):
        return None
    if math.isclose(base, tuned, rel_tol=SAME) or (error is not None and within_noise(tuned - base, error)):
        return None
    return (tuned < base) == metric(name).less


def is_noise(name: str, base: float | None, tuned: float | None, error: float | None) -> bool:
    """Return whether a difference is there, and is no more than two standard `error`s."""
    return improved(name, base, tuned) is not None and improved(name, base, tuned, error) is None


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
