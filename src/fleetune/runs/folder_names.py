# SPDX-License-Identifier: Apache-2.0
"""Read and make the names of run folders, `NNNN-method-model`, and suggest the one that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from fleetune.common.shell import quoted
from fleetune.errors import UsageError


def slug(text: str) -> str:
    """A text as part of a folder's name: lower case, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def of_model(name: str) -> str:
    """The name of a model (a hub id, a file, a folder) as part of a folder's or a file's name, a GGUF file's without its end."""
    return slug(Path(name).name.removesuffix(".gguf")) or "model"


def number(path: Path) -> int:
    """The number that a run folder's name begins with, 0 for none."""
    match = re.match(r"(\d{4,})-", path.name)
    return int(match[1]) if match else 0


def numbered_in(folder: Path) -> list[str]:
    """The names of the runs and compressions in a folder; none of one that cannot be listed."""
    try:
        return sorted(p.name for p in folder.iterdir() if number(p) and p.is_dir())
    except OSError:
        return []


def none_such(name: str, out: Path, there: Sequence[str]) -> UsageError:
    """The error for a run that is not there, with those whose names are like its, else the newest."""
    elsewhere = "" if str(out) == "runs" else f" --out {quoted(out)}"
    begins = re.match(r"\d*", name)
    same = [other for other in there if begins and begins[0] and number(Path(other)) == int(begins[0])]
    near = list(dict.fromkeys([*same, *difflib.get_close_matches(name, there, 3)]))[:3]
    hint = f"runs there are: fleetune runs{elsewhere}"
    if near:
        hint = f"did you mean {' or '.join(str(out / other) for other in near)}? {hint}"
    elif there:
        hint = f"the newest is {out / there[-1]}; {hint}"
    return UsageError(f"no run '{name}' in {out}", hint=hint)
