# SPDX-License-Identifier: Apache-2.0
"""Keep a device's files in its state folder and nowhere else, and the secret that its digests are keyed with.

    state/
      secret                       32 random bytes, for the owner alone
      calibrated.json              which result on which windows of which rows this device has calibrated
      measured.json                which results it has measured
      run-3f2a../                  what belongs to a run: memories, result/, calibration/

A folder in a run's is emptied and removed only where it has `MARK`, the file with which it was made here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shutil
from pathlib import Path
from typing import Final

from fleetune.common.files import PRIVATE, read_bytes, read_text, storage_error, write_atomic
from fleetune.errors import StorageError
from fleetune.fleet.reasons import Declined

MARK: Final = ".fleetune-device"
SECRET: Final = "secret"
CALIBRATED: Final = "calibrated.json"
MEASURED: Final = "measured.json"
RESULTS: Final = 16  # that are measured
RUNS: Final = 64  # whose folders may lie there


class DeviceState:
    """The state folder of a device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keyed(self, digest: str) -> str:
        """Return HMAC-SHA256 of a digest, hexadecimal: the same for the same rows on this device, and a riddle elsewhere."""
        return hmac.new(self._secret(), digest.encode(), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        file = self.folder / SECRET
        try:
            if not file.exists():
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_atomic(file, secrets.token_bytes(32), mode=PRIVATE)
            return read_bytes(file)
        except OSError as error:
            raise storage_error(error, file) from error

    def run(self, run: str) -> Path:
        """Return the folder of a run, by its 32 hexadecimal digits; StorageError where it leads out of the state folder."""
        folder = self._own(self.folder / f"run-{run}")
        if not folder.exists() and sum(1 for _ in self.folder.glob("run-*")) >= RUNS:
            raise StorageError(
                f"{RUNS} runs have left folders in {self.folder}",
                hint="remove those of runs that are over: run-*",
            )
        return folder

    def renewed(self, folder: Path) -> Path:
        """Make a folder of a run anew, empty but for `MARK`; StorageError for one that was not made here."""
        self.remove(folder)
        try:
            folder.mkdir(parents=True, mode=0o700)
            write_atomic(folder / MARK, b"", mode=PRIVATE)
        except OSError as error:
            raise storage_error(error, folder) from error
        return folder

    def remove(self, folder: Path) -> None:
        """Remove a folder of a run, if it is there; StorageError for one that was not made here."""
        if not self._own(folder).exists():
            return
        if not (folder / MARK).is_file():
            raise StorageError(
                f"{folder} was not made by this device; it is left alone", hint="move it elsewhere"
            )
        shutil.rmtree(folder, ignore_errors=True)

    def _own(self, folder: Path) -> Path:
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise StorageError(f"{folder} leads out of {self.folder}", hint="remove the link")
        return folder

    def calibrate_on(self, rows: str, result: str, windows: int, length: int) -> None:
        """Note that sums of this result over so many windows of the rows with this digest leave the device.

        Declined where others did before: the difference of two sums over nearly the same tokens shows the tokens, and so do
        sums of many results that are made for it.
        """
        file, wanted = self.folder / CALIBRATED, [self.keyed(rows), result, windows, length]
        if file.exists():
            before = json.loads(read_text(file))
            if before != wanted:
                hint = f"to allow it, for a server that you would give the rows: remove {file}"
                raise Declined("calibrated", int(before[2]), int(before[3]), hint=hint)
            return
        write_atomic(file, json.dumps(wanted), mode=PRIVATE)

    def measure(self, result: str) -> None:
        """Note that a result is measured on this device's rows; Declined where `RESULTS` others were.

        A result that is made for it tells a few tokens of the rows, so that many tell all.
        """
        file = self.folder / MEASURED
        known = {result, *(json.loads(read_text(file)) if file.exists() else ())}
        if len(known) > RESULTS:
            hint = f"to allow it, for a server that you would give the rows: remove {file}"
            raise Declined("measured", RESULTS, hint=hint)
        write_atomic(file, json.dumps(sorted(known)), mode=PRIVATE)
