# SPDX-License-Identifier: Apache-2.0
"""A run folder as one page to read: what was done, what came of it, what it cost, and how to do it again.

The page is one HTML file with its style and its plots (inline SVG) inside: it opens from the disk, asks the
network for nothing (a content policy forbids it), follows the reader's light or dark scheme and prints.
Every plot has a title and a description for those who do not see it and its numbers in a table.

`runlog` reads the folder, `page` has the parts of a page, `axes`, `svg` and `charts` draw, `sections` say what
there is to say of a run, `single` and `several` put them together; `cells` and `grid` are the sweep's numbers and page.
"""

from __future__ import annotations

from fleetune.runs.report.grid import grid
from fleetune.runs.report.grid import tables as grid_tables
from fleetune.runs.report.runlog import measures, read, summary, table
from fleetune.runs.report.several import compare
from fleetune.runs.report.single import write

__all__ = ["compare", "grid", "grid_tables", "measures", "read", "summary", "table", "write"]
