# SPDX-License-Identifier: Apache-2.0
"""Write a command so that it can be pasted into a shell: a path with a space is quoted."""

from __future__ import annotations

import shlex


def quoted(word: object) -> str:
    """Return one word of a command, in quotes where a shell would split or expand it."""
    return shlex.quote(str(word))


def command(*words: object) -> str:
    """Return `fleetune WORD ..`, each word quoted where it needs to be."""
    return shlex.join(["fleetune", *map(str, words)])
