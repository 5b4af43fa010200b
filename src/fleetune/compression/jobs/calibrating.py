# SPDX-License-Identifier: Apache-2.0
"""Check who calibrates, say what finished blocks were made of, and give the Hessians that a solver calibrates on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from fleetune.common.events import CalibrationReply
from fleetune.common.files import json_text, read_json
from fleetune.common.shell import quoted
from fleetune.compression import DEFAULT_OF_DEVICES, Corrector, Solver
from fleetune.errors import StorageError, UsageError
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import CLIENTS, FLEET, CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compression.jobs.contract import Devices
    from fleetune.compression.jobs.inputs import Inputs
    from fleetune.compression.layerwise.activations import HessianSource
    from fleetune.compression.layerwise.sums import HessianReply

ORIGIN: Final = (
    "origin.json"  # in the folder of finished blocks: the weights, settings and text that made them
)
REPLIES: Final = "replies.jsonl"  # there too: of the clients


class Calibrated(Protocol):
    """The parts of a job that calibration works with."""

    @property
    def request(self) -> CompressRequest:
        """The request."""

    @property
    def solver(self) -> Solver:
        """The method and its settings."""

    @property
    def inputs(self) -> Inputs:
        """The model and its rows."""

    @property
    def calibration(self) -> Tensor | None:
        """Windows int64 [n, length]; None where others have them, or the solver needs none."""

    @property
    def shares(self) -> Mapping[int, Tensor]:
        """The windows of each client; {} unless clients calibrate."""

    @property
    def devices(self) -> Devices | None:
        """Real devices, where these calibrate."""

    @property
    def replies(self) -> list[HessianReply]:
        """The clients' replies so far."""

    @property
    def agreed(self) -> dict[int, int]:
        """How many windows each client calibrates on, once it is known."""


def check(request: CompressRequest, solver: Solver) -> None:
    """Raise UsageError for options that a solver has no place for that compares with the dense model, or weighs tokens.

    Gradients, which a size is spent by as well, are of predictions: of windows of 2 tokens or more.
    """
    if request.length < 2 and (weighs(solver) or request.bytes or request.bpw):
        raise UsageError(
            "--length 1: nothing is predicted in windows of 1 token, so there is no gradient by which "
            + ("tokens could count" if weighs(solver) else "a size could be spent"),
            hint="give a larger --length",
        )
    if weighs(solver) and request.calibrate in (CLIENTS, FLEET):
        raise UsageError(
            f"tokens = gradient takes the gradient of the whole model on text that is here, and --calibrate {request.calibrate} "
            "leaves it where it is",
            hint="--set tokens=equal   or calibrate on --text",
        )
    if not isinstance(solver, Corrector):
        return
    if request.calibrate in (CLIENTS, FLEET):
        raise UsageError(
            f"{request.method} compares with the dense model on text that is here, and --calibrate {request.calibrate} "
            "leaves it where it is",
            hint=f"--method {DEFAULT_OF_DEVICES}   or calibrate on --text",
        )
    if request.true_sequential:
        raise UsageError(
            f"{request.method} is true sequential in any case", hint="leave out --true-sequential"
        )


def weighs(solver: Solver) -> bool:
    """Tell whether a solver's tokens count by the gradient of the loss."""
    return getattr(solver, "tokens", "equal") == "gradient"


def check_origin(listener: Listener, own: str, model: str, parts: Path) -> None:
    """Note in `parts` what the blocks there are made of, `own`; blocks of unknown origin are removed.

    UsageError for blocks of other weights, settings or text; `model` names what to compress again.
    """
    from fleetune.common.files import write_atomic

    file = parts / ORIGIN
    if (found := _origin(file)) not in ("", own):
        raise UsageError(
            f"the blocks in {parts} were made of other weights or another text: something has changed since",
            hint=f"compress again: fleetune compress {quoted(model)}",
        )
    if not found and any(parts.glob("block-*")):
        listener.note(
            f"{file} is damaged or gone, so nothing says what the blocks there are of: they are solved again"
        )
        compression_folder.drop_parts(parts)
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json_text({"origin": own}))


def _origin(file: Path) -> str:
    """The origin that is written beside finished blocks; "" where it is gone or cannot be read."""
    try:
        return str(read_json(file, "").get("origin", ""))
    except StorageError:
        return ""


def source(listener: Listener, job: Calibrated, parts: Path) -> Tensor | HessianSource | None:
    """Return the windows of a job, or its clients' or devices' Hessians; None for a solver without data."""
    from fleetune.compression.layerwise.federated import ClientHessians
    from fleetune.compression.layerwise.sums import WARNING

    if not job.shares and job.devices is None:
        return job.calibration
    log = parts / REPLIES
    job.replies.extend(_earlier(log))
    gone = frozenset(reply.client for reply in job.replies if reply.reason)

    def on_reply(reply: HessianReply) -> None:
        listener.event(CalibrationReply(**asdict(reply)))
        if reply.reason:
            listener.note(f"block {reply.block + 1}: client {reply.client} is left out: {reply.reason}")
        job.replies.append(reply)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(reply)) + "\n")

    listener.note(WARNING)
    if job.devices is not None:
        found, agreed = job.devices.source(
            job.request, job.inputs.model, parts.parent, gone, on_reply, listener
        )
        job.agreed.update(agreed)
        return found
    left = {client: own for client, own in job.shares.items() if client not in gone}
    return ClientHessians(job.inputs.model, left or job.shares, parts, on_reply)


def _earlier(log: Path) -> list[HessianReply]:
    """Read the replies before a stop: what they sent counts, and a client that was left out stays out."""
    from fleetune.compression.layerwise.sums import HessianReply

    found = list[HessianReply]()
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with suppress(ValueError, TypeError):  # cut short by a kill
            found.append(HessianReply(**json.loads(line)))
    return found


def stated(job: Calibrated) -> dict[str, Any]:
    """Return what the head of an artefact states of the calibration text: its size and digest; {} for none.

    Clients that calibrate keep the digest of their text to themselves: who guesses a text could confirm it.
    """
    if job.agreed:
        count = sum(job.agreed.values())
        return {"windows": count, "length": job.request.length, "clients": len(job.agreed)}
    if job.calibration is None:
        return {}
    count, length = job.calibration.shape
    how = {"true_sequential": True} if job.request.true_sequential else {}
    return {"windows": count, "length": length, "sha256": sha256(job.calibration), **how}


def sha256(windows: Tensor) -> str:
    """Return the SHA-256 of windows int64 [n, length], hexadecimal."""
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()
