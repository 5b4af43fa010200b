# SPDX-License-Identifier: Apache-2.0
"""Every file of a folder, spoilt in every form: right, refused by name, or a loss that is said; never silent, never endless.

Over all kinds of jobs that is more than a thousand folders: `make faults`.  `test_integrity.py` has a sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torn_harness
from torn_harness import DRAWN, FORMS, KINDS, Folder, Verdict

from fault_report import Injected

LEAST = 300  # torn folders of a kind


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """The working folder, with the model and the rows of all jobs."""
    before = Path.cwd()
    os.chdir(tmp_path)
    torn_harness.lay_out(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_torn_folder_of(kind: str, place: Path, injected: Injected) -> None:
    found: list[Verdict] = []
    folders = torn_harness.whole_and_stopped(kind)
    for seed in count():
        found += torn(folders, DRAWN if seed else FORMS, seed, place)
        if len(found) >= LEAST:
            break
    counts = Counter(v.outcome for v in found)
    print(f"{kind}: {len(found)} torn folders, {dict(counts)}")
    injected("torn folders of jobs", len(found), survived=sum(not v.fault for v in found))
    assert [f"{v.name}: {v.fault}" for v in found if v.fault] == []


def torn(folders: list[Folder], forms: tuple[str, ...], seed: int, place: Path) -> Iterator[Verdict]:
    """Spoil every file of these folders in each of the forms; `seed` says where in the file."""
    for folder in folders:
        for file in folder.files:
            for form in forms:
                if (verdict := torn_harness.judge(folder, file, form, place, seed)) is not None:
                    yield verdict
