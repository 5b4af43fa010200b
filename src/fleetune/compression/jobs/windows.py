# SPDX-License-Identifier: Apache-2.0
"""Cut calibration windows: from rows, a text, each client's rows, or text that the model writes itself.

A run's held-out rows are few and all of one kind.  Calibrated on them alone a model is good at rows like these and worse
at everything else, and its loss on the other rows does not show it.  So a run is calibrated on its rows and on text that
its model writes, and is measured on more of that text as well.  Where the rows fill no window, that text stands alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fleetune.common.display import counted
from fleetune.compression.jobs.inputs import Inputs
from fleetune.errors import DataError, UsageError
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

OWN: Final = 8  # windows that the model of a run writes to be calibrated on
MEASURED: Final = 4  # and to be measured on


def windows(request: CompressRequest, inputs: Inputs, listener: Listener, *, dry: bool = False) -> Tensor:
    """Return int64 [N, length]: windows of the request's rows or text; without both, of text that the model writes.

    Where a run is `dry` the model writes nothing, and zeros stand for its text: their number is all that is needed.
    """
    import numpy as np

    from fleetune import data
    from fleetune.compression.layerwise import driver

    model = inputs.model
    check_length(request, inputs)
    if inputs.rows:
        ids = [np.asarray(row.ids) for row in inputs.rows]
    elif request.text:
        encode = model.tokenizer
        ids = [np.asarray(encode(text, verbose=False)["input_ids"]) for text in data.read_text(request.text)]
    elif request.low_memory:
        raise UsageError(
            "with --low-memory the model cannot write its own text: each token would read all of it anew",
            hint="give some: --text FILE or --data FILE",
        )
    else:
        listener.note(
            f"no calibration text is given: the model {_writes(dry)} {counted(request.windows, 'window')} itself"
        )
        if dry:
            return _unwritten(request.windows, request.length)
        return driver.sampled_windows(model, request.length, request.windows, request.seed)
    return driver.windows(ids, request.length, request.windows)


def _writes(dry: bool) -> str:
    return "would write" if dry else "writes"


def _unwritten(count: int, length: int) -> Tensor:
    import torch

    return torch.zeros(count, length, dtype=torch.int64)


def of_run(
    request: CompressRequest, inputs: Inputs, listener: Listener, *, dry: bool = False
) -> tuple[Tensor, Inputs]:
    """Return int64 [N, length], windows of a run's rows and of its model's text, and the inputs with more of that text.

    At most half of the request's windows are the model's; all are where the rows do not fill one, and that is noted.
    `dry` as in `windows`.
    """
    import numpy as np
    import torch

    from fleetune.compression.layerwise import driver
    from fleetune.data.encode import Encoded

    check_length(request, inputs)
    tokens = sum(len(row.ids) for row in inputs.rows)
    filled = tokens >= request.length
    own = min(OWN, request.windows // 2 if filled else request.windows)
    ids = [np.asarray(row.ids) for row in inputs.rows]
    rows = [driver.windows(ids, request.length, request.windows - own)] if filled else []
    if not filled:
        listener.note(
            f"{inputs.source} has {counted(tokens, 'token')}, and a window needs {request.length}: the model is calibrated on "
            "text alone that it writes itself; a smaller --length takes the rows in, --data FILE or --text FILE gives more"
        )
    count, wrote = own + MEASURED, "would write" if dry else "wrote"
    listener.note(f"the model {_writes(dry)} {count} windows of text: {MEASURED} of them are measured on")
    if dry:
        written = _unwritten(count, request.length)
    else:
        written = driver.sampled_windows(inputs.model, request.length, count, request.seed, batch=count)
    source = f"{counted(own, 'window')} that the run's model {wrote}"
    if filled:
        source = f"{inputs.source}: {counted(len(rows[0]), 'window')}, and {own} that its model {wrote}"
    text = [Encoded(ids=window, n_prompt=1) for window in written[own:].numpy()]
    return torch.cat([*rows, written[:own]]), replace(inputs, own_text=text, source=source)


def of_clients(request: CompressRequest, inputs: Inputs, listener: Listener) -> dict[int, Tensor]:
    """Return client -> its windows: an equal part of the request's, at least one; a client that fills none is left out."""
    import numpy as np
    import torch

    from fleetune.compression.layerwise import driver

    check_length(request, inputs)
    each, found = each_of(request.windows, len(inputs.clients)), dict[int, torch.Tensor]()
    for client, rows in inputs.clients.items():
        try:
            found[client] = driver.windows([np.asarray(row.ids) for row in rows], request.length, each)
        except DataError as error:
            listener.note(f"client {client} is left out: {error.message}")
    if not found:
        raise DataError(
            f"no client has text for a window of {request.length} tokens", hint="give a smaller --length"
        )
    return found


def each_of(windows: int, clients: int) -> int:
    """Return how many of a request's windows each of so many clients takes, at most."""
    return max(1, windows // clients)


def check_length(request: CompressRequest, inputs: Inputs) -> None:
    """Raise UsageError for windows that are longer than the model's context."""
    from fleetune.evaluation.losses import context_length

    if request.length > (longest := context_length(inputs.model)):
        raise UsageError(
            f"windows of {request.length} tokens are longer than the model's {longest}",
            hint=f"--length {min(longest, 512)}",
        )
