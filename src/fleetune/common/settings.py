"""Declare settings as fields of a frozen dataclass, list them, and parse what people write.

    @dataclass(frozen=True)
    class Method:
        K: int = setting(1024, "K", "directions in the pool")

A `__post_init__` raises ValueError(*problems), in plain words, for values that do not go together.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, get_type_hints

from fleetune.errors import RecipeError, UsageError, suggest

T = TypeVar("T")

Value = str | int | float | bool  # of an option or a setting

AUTO = "auto"  # the value of a setting that is to be found before the work begins


def setting(
    default: T, symbol: str, help: str, *, only_if: str = "", auto: bool = False, found: bool = False
) -> T:
    """Declare a field of a settings dataclass: its default, the paper's symbol for it, and a help text.

    `only_if` says when it has an effect: NAME where that other setting is not 0, empty or false, NAME=VALUE|VALUE where it
    has one of these values, NAME<NUMBER where it is less.  `auto`: the value `auto` is taken too, and stands for one that is
    found before the work begins; `found`: it is also what stands where no value is given (`tuning/prepare/rates.py`).
    """
    about = {"symbol": symbol, "help": help, "only_if": only_if, "auto": auto or found, "found": found}
    declared: T = dataclasses.field(default=default, metadata=about)
    return declared


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass, as it is listed and parsed."""

    name: str
    type: type
    default: Any
    symbol: str
    help: str
    only_if: str = ""
    auto: bool = False
    found: bool = False

    @property
    def shown(self) -> str:
        """The default in words."""
        published = f" (published: {self.default})" * bool(self.default)
        return f"auto{published}" if self.found else str(self.default)

    def has_effect(self, chosen: object) -> bool:
        """Whether it has an effect beside the other values of `chosen`, an instance of its class."""
        if not self.only_if:
            return True
        name = re.split("[=<]", self.only_if)[0]
        value, values = getattr(chosen, name), self.only_if[len(name) + 1 :]
        if "<" in self.only_if:
            return bool(value < float(values))
        return str(value) in values.split("|") if values else bool(value)

    @property
    def switch(self) -> str:
        """The setting that turns this one on when it is not 0; "" where there is none."""
        return self.only_if if self.only_if.isidentifier() else ""


def of(cls: type) -> list[Setting]:
    """List the settings of a class, in order."""
    hints = get_type_hints(cls)
    return [
        Setting(f.name, hints[f.name], f.default, **{"symbol": f.name, "help": "", **f.metadata})
        for f in dataclasses.fields(cls)
    ]


def named(method: object, modules: Mapping[str, str]) -> tuple[str, dict[str, Value]]:
    """Return a method's name and settings, from its name or from its own dataclass; `modules` is name -> module.

    UsageError for anything else.
    """
    if isinstance(method, str):
        return method, {}
    if isinstance(method, type):
        raise UsageError("the method is a class", hint=f"give an instance of it: {method.__name__}(..)")
    name = next((n for n, module in modules.items() if module == type(method).__module__), None)
    if name is None or not dataclasses.is_dataclass(method):
        raise UsageError(
            f"a {type(method).__name__} of {type(method).__module__} is not a registered method",
            hint=f"there are: {', '.join(modules)}; CONTRIBUTING.md registers one of your own",
        )
    return name, {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return the texts of `--set NAME=VALUE ..` by name; RecipeError for one without a value."""
    chosen = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RecipeError([f"--set {text!r} is not NAME=VALUE"], hint="for example --set K=4096")
        chosen[name.strip()] = value.strip()
    return chosen


def make(cls: type[T], name: str, values: Mapping[str, Any], *, hint: str) -> T:
    """Return a `cls` with these values (texts are parsed), called `name` in errors; for `auto` stands the default.

    RecipeError lists all that is wrong.
    """
    parsed, problems = parsed_values(of(cls), name, values)
    try:  # also where some are wrong already: the others may be too
        made = cls(**parsed)
    except ValueError as error:  # a __post_init__ says what is wrong in plain words, each problem an argument
        problems.extend(f"{name}: {problem}" for problem in error.args or [error])
    else:
        if not problems:
            return made
    raise RecipeError(problems, hint=hint)


def parsed_values(
    declared: Sequence[Setting], name: str, values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the settings that are `declared`, parsed, and what is wrong with the others; `auto` is left out."""
    known = {s.name: s for s in declared}
    parsed, problems = {}, []
    for key, value in values.items():
        if key not in known:
            guess = suggest(key, known, cutoff=0.5)
            problems.append(f"{name} has no setting '{key}'.{guess} It has: {', '.join(known)}")
            continue
        if value == AUTO and known[key].auto:
            continue
        try:
            parsed[key] = _parse(value, known[key].type)
        except (ValueError, OverflowError):
            problems.append(f"{name}: {key} = {value!r} is not {_article(known[key].type)}")
    return parsed, problems


def _parse(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError
    if kind is int:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    if kind is str and not isinstance(value, str | int | float):
        raise ValueError
    if kind is str and isinstance(value, bool):
        return str(value).lower()  # a setting may take auto beside true and false
    return kind(value)


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(
        kind, kind.__name__
    )


_COMMA: Final = re.compile(r"(?<!\\),")


def split_words(text: str) -> list[str]:
    """Return the words of a text, without spaces around them; an empty one for nothing between two commas."""
    return [word.strip().replace("\\,", ",") for word in _COMMA.split(text)]


def given_words(text: str) -> list[str]:
    """Return the words of a text without empty ones."""
    return [word for word in split_words(text) if word]


def join_words(words: Iterable[str]) -> str:
    """Return the text that `split_words` reads as these words, where none ends with a backslash."""
    return ",".join(word.replace(",", "\\,") for word in words)


LEAST: Final = 1_000_000  # a number without a unit that is smaller was meant in another one
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"
_BYTES = re.compile(_NUMBER + r"(?:([kmgt]i?)?b?)\s*", re.IGNORECASE)
_RATE = re.compile(_NUMBER + r"([kKmMgG]i?)?(bits?|b|B)(?:/s|ps|/sec)\s*")


def parse_bytes(text: str | None, flag: str = "--ram", least: int = LEAST) -> int | None:
    """Parse a size as bytes: 4GB, 512 MB, 2GiB, 8e9.  None stays None; UsageError, which names `flag`, for anything else.

    A plain number below `least` is taken for one whose unit was forgotten.
    """
    if text is None:
        return None
    found = _BYTES.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) if found else 0.0
    if not 1 <= value < math.inf:
        raise UsageError(f"{flag} {text!r} is not a size", hint="write 4GB, 512MB, 2GiB or a number of bytes")
    if found and text.strip()[-1] in "0123456789." and value < least:
        raise UsageError(
            f"{flag} {text}: {text.strip()} bytes are too few. Did you mean {text.strip()}GB?",
            hint="write 4GB, 512MB, 2GiB or a number of bytes",
        )
    return int(value)


def parse_rate(text: str | None) -> float | None:
    """Parse a speed as bytes a second: 1Mbps, 500kbit/s, 2 MB/s (b is a bit, B a byte).  None stays None."""
    if text is None:
        return None
    found = _RATE.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) / (1 if found[3] == "B" else 8) if found else 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--uplink {text!r} is not a speed", hint="write 1Mbps, 500kbit/s or 2MB/s")
    return value


def _factor(prefix: str | None) -> int:
    if not prefix:
        return 1
    power = "kmgt".index(prefix[0].lower()) + 1
    return int(1024**power if len(prefix) == 2 else 1000**power)
