"""Find the recipes that come with Fleetune by name: `recipe:NAME` where a command takes a recipe's file.

A recipe's first comment says what it does; a line "Expected: .." before it states the outcome, which a test repeats.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetune.errors import RecipeError, UsageError, suggest

PREFIX: Final = "recipe:"
FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class Named:
    """A recipe that comes with Fleetune."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def values(self) -> dict[str, Any]:
        """Its keys; those of `[set]` and `[sweep]` are dicts."""
        return tomllib.loads(self.text)

    @property
    def sweeps(self) -> bool:
        """Whether it is a grid of runs (`fleetune sweep`)."""
        return "sweep" in self.values

    @property
    def expected(self) -> str:
        """The outcome that it states, such as "validation loss 4.130 -> 3.062"; "" for none."""
        return next((w.removeprefix("Expected: ").rstrip(".") for w in self._comment if _states(w)), "")

    @property
    def about(self) -> str:
        """What it does: the first sentence of its comment, up to its first colon."""
        told = " ".join(w for w in self._comment if not _states(w))
        return re.split(r"[.:;](?:\s|$)", told, maxsplit=1)[0]

    @property
    def _comment(self) -> list[str]:
        """The lines of the comment at its top, to the first empty one."""
        found = []
        for line in self.text.splitlines():
            if not (words := line.removeprefix("#").strip()) or not line.startswith("#"):
                break
            found.append(words)
        return found


def _states(line: str) -> bool:
    return line.startswith("Expected: ")


def every() -> dict[str, Named]:
    """Return the recipes by name."""
    return {path.stem: Named(path.stem, path) for path in sorted(FOLDER.glob("*.toml"))}


def named(name: str) -> Named:
    """Return the recipe called `name`, with `recipe:` before it or not, and with "-" for "_"; UsageError when there is none."""
    known, asked = every(), name.removeprefix(PREFIX).removesuffix(".toml").replace("-", "_")
    if asked not in known:
        raise UsageError(
            f"no recipe named '{asked}'.{suggest(asked, known)}",
            hint=f"there are: {', '.join(known)} (fleetune recipes)",
        )
    return known[asked]


def find(file: str) -> Path:
    """Return the path that a command's recipe means: `recipe:NAME`, or a file.

    UsageError for a name that is none; RecipeError for a file that is not there and whose name is that of a recipe here.
    """
    if file.startswith(PREFIX):
        return named(file).path
    path = Path(file)
    if not path.exists() and path.stem in every():
        raise RecipeError(
            [f"no recipe at {path}"], hint=f"one of that name comes with Fleetune: {PREFIX}{path.stem}"
        )
    return path
