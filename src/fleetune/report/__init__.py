"""Write a run folder as one HTML page: what was done, the result, the cost, and the command to repeat it.

The page is one HTML file with its style and its plots (inline SVG) inside: it opens from the disk, asks the
network for nothing (a content policy forbids it), follows the reader's light or dark scheme and prints.
Every plot has a title and a description for those who do not see it and its numbers in a table.

`runlog` reads the folder and tells runs in a terminal, `page` has the parts of a page, `svg` draws, `single`
is the page of a run with the rounds and clients of `course`, `sweep` the table and the page of a sweep.
"""

from __future__ import annotations

from fleetune.report.runlog import (
    APART,
    caveats,
    changed,
    differing,
    facts,
    measures,
    read,
    results,
    samples,
    summary,
    table,
)
from fleetune.report.single import write

__all__ = [
    "APART",
    "caveats",
    "changed",
    "differing",
    "facts",
    "measures",
    "read",
    "results",
    "samples",
    "summary",
    "table",
    "write",
]
