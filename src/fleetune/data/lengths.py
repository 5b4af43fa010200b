# SPDX-License-Identifier: Apache-2.0
"""Count the rows that are longer than `max_length`, and say what of them is cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetune.common.display import counted

if TYPE_CHECKING:
    from fleetune.data.encode import Encoded


@dataclass(frozen=True)
class Cut:
    """What of some encoded rows did not fit."""

    rows: int  # all rows
    longer: int  # rows that are cut
    prompts: int  # of these, rows that lose the middle of the prompt (an encoder's: the end of a text)
    answers: int  # of these, rows that lose the end of the answer
    longest: int  # tokens of the longest row before it is cut

    def told(self, max_length: int) -> str:
        """Say what is cut; "" where nothing is."""
        if not self.longer:
            return ""
        parts = [f"the prompt of {self.prompts:,}"] * (self.prompts > 0)
        parts += [f"the answer of {self.answers:,}"] * (self.answers > 0)
        verb = "is" if self.longer == 1 else "are"
        return (
            f"{self.longer:,} of {counted(self.rows, 'row')} {verb} longer than max_length={max_length} and {verb} cut: "
            f"{', '.join(parts)}; "
            f"the longest has {self.longest:,} tokens"
        )


def remarks(notes: Sequence[str], rows: int, dropped: int, cut: Cut, max_length: int) -> list[str]:
    """Say what of `rows` rows was left out (`notes`, and `dropped` ones), and what is cut; [] where all are whole."""
    found = list(notes)
    if dropped:
        found.append(
            f"{dropped:,} of {counted(rows, 'row')} {'is' if dropped == 1 else 'are'} left out: "
            "the tokenizer knows nothing of their answers"
        )
    return found + [told for told in [cut.told(max_length)] if told]


def cut(rows: Iterable[Encoded]) -> Cut:
    """Count what of encoded rows did not fit."""
    count = longer = prompts = answers = longest = 0
    for row in rows:
        count += 1
        longer += row.left + row.lost > 0
        prompts += row.left > 0
        answers += row.lost > 0
        longest = max(longest, len(row.ids) + row.left + row.lost)
    return Cut(count, longer, prompts, answers, longest)
