# SPDX-License-Identifier: Apache-2.0
"""Write what was measured into the compression's folder, where `export` reads the kept gain to warn by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fleetune.common.events import Measured, as_dict
from fleetune.common.files import write_atomic
from fleetune.deploy.measure.harness import FILE, KeptGain
from fleetune.models.artefact import Master
from fleetune.models.artefact_folder import is_master
from fleetune.runs import compression_folder, sealed

RECORDED: Final = (
    "threads", "prompt_tokens", "new_tokens", "repeats", "text", "windows", "length", "data", "limit",
)  # fmt: skip


def write(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Measured], kept: Mapping[str, KeptGain]
) -> None:
    """Write measure.json; a kept gain that is known for the same artefact stays in it."""
    model = compression_folder.model_in(folder)
    digest = Master(model).digest() if is_master(model) else ""
    known = kept_fields(kept)
    if not known:
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
            before = json.loads((folder / FILE).read_text(encoding="utf-8"))
            known = before["kept"] if before["digest"] == digest else {}
    content = {"v": 1, "digest": digest, **settings, "rows": [fields_of(row) for row in rows], "kept": known}
    write_atomic(folder / FILE, json.dumps(sealed.finite(content), indent=1) + "\n")


def fields_of(row: Measured) -> dict[str, Any]:
    """A line of the table, as the file and the last event hold it."""
    return {name: value for name, value in as_dict(row).items() if name != "event"}


def kept_fields(kept: Mapping[str, KeptGain]) -> dict[str, dict[str, Any]]:
    """The kept gain of each measure, as the file and the last event hold it."""
    return {name: asdict(gain) for name, gain in kept.items()}
