# SPDX-License-Identifier: Apache-2.0
"""Do one client's local work of a round: the same function in a simulated fleet and on a real device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetune.common.memory import give_back
from fleetune.data import Batch, Batches
from fleetune.models.net.model import Model
from fleetune.tuning.exchange.messages import Message, encode

if TYPE_CHECKING:
    from fleetune.tuning.methods import Method
    from fleetune.tuning.rounds.fleets.memories import Memories


def work(
    method: Method,
    model: Model,
    batches: Batches,
    key: int,
    received: Message,
    memories: Memories,
    on_step: Callable[[int, int], None],
    done: WorkDone | None = None,
) -> bytes:
    """Do what was `received`, for the client whose rows `batches` has; return its reply, and keep what it remembers.

    The method takes the message's arrays out of it, so that they need not be in memory as long as it works.
    `on_step(client, step)` is called before every local step; `done` counts the steps and their tokens.
    """
    memory = memories.of(batches.client)
    watched = Watched(batches, on_step, done or WorkDone())
    give_back()  # what was done before: an evaluation, another client's work, the message's bytes
    reply = method.local(model, received.payload, watched, key, memory)  # type: ignore[arg-type]
    memories.keep(batches.client, received.round, memory)
    give_back()  # what training leaves behind, so that the reply's bytes do not come on top of it
    return encode(Message(received.round, received.base, reply))


@dataclass
class WorkDone:
    """The local steps that a client has made, and the tokens of their rows (prompts included, padding not)."""

    steps: int = 0
    tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Count a step."""
        self.steps += 1
        self.tokens += int(batch.attention_mask.sum())


class Watched:
    """Batches that report each step before it is taken (for the progress bar, and so that Ctrl-C is heard)."""

    def __init__(self, batches: Batches, on_step: Callable[[int, int], None], done: WorkDone) -> None:
        self.batches, self.on_step, self.done = batches, on_step, done
        self.n, self.client, self.step = batches.n, batches.client, 0

    def steps(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Like `Batches.steps`."""
        return self._watch(self.batches.steps(count, batch_size))

    def epochs(self, epochs: int, batch_size: int) -> Iterator[Batch]:
        """Like `Batches.epochs`."""
        return self._watch(self.batches.epochs(epochs, batch_size))

    def repeat_batch(self, number: int, batch_size: int, count: int) -> Iterator[Batch]:
        """Like `Batches.repeat_batch`."""
        return self._watch(self.batches.repeat_batch(number, batch_size, count))

    def heard(self) -> None:
        """Report the step that is taken; once more between pieces of work that are no steps."""
        self.on_step(self.client, self.step)

    def split_off(self, batch_size: int) -> tuple[Batch, Watched]:
        """Like `Batches.split_off`."""
        batch, rest = self.batches.split_off(batch_size)
        return batch, Watched(rest, self.on_step, self.done)

    def _watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for self.step, batch in enumerate(batches):
            self.heard()
            self.done.add(batch)
            yield batch
