"""Keep a device's files in its state folder and nowhere else, and the secret that its digests are keyed with.

secret                       32 random bytes, for the owner alone
calibrated.json              which result on which windows of which rows this device has calibrated, and by which blocks
measured.json                what it has measured, and at which length and with which labels of which rows
privacy.json                 what has been spent of its privacy budget
log.txt                      what happened when (runs/listener.py)
answer                       the last answer: given again when its order comes again
run-3f2a../                  a run's memories, result/, calibration/, sum.ckpt; removed only where it has `MARK`
"""

import hashlib
import hmac
import json
import secrets
import shutil
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import PRIVATE, read_bytes, read_json, storage_error, write_atomic
from fleetune.errors import StorageError
from fleetune.fleet.orders import Declined, Job
from fleetune.privacy import mechanism
from fleetune.privacy.mechanism import Privacy

MARK: Final = ".fleetune-device"
SECRET: Final = "secret"
CALIBRATED: Final = "calibrated.json"
MEASURED: Final = "measured.json"
PRIVACY: Final = "privacy.json"
MOST_MEASUREMENTS: Final = 16  # of the same rows, the one of the base included
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
                f"{RUNS} runs have left folders in {self.folder}: this device takes part in no other until some are removed",
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

    def allow_calibration(self, rows: str, job: Job, windows: int, length: int, *, note: bool) -> bool:
        """Allow sums of the job's result over so many windows of the rows with this digest, and `note` that they leave.

        Return whether they were noted before.  Declined where others were, of another result, base or type: the difference of
        two sums over nearly the same tokens shows the tokens, and so do sums of many models that are made for it.  Of a sealed
        run, also where they were in another run's sums, or in sums of other members at most: two of them show one device's.
        """
        model = job.reading + job.train + job.result
        if job.secure is not None:
            model += f" {job.run} {job.secure}"
        file, wanted = self.folder / CALIBRATED, [self.keyed(rows), self.keyed(model), windows, length]
        if known := file.exists():
            if (before := _noted(file, on=list, blocks=dict))["on"] != wanted:
                raise self._calibrated(before)
        elif note:
            write_atomic(file, json.dumps({"on": wanted, "blocks": {}}), mode=PRIVATE)
        return known

    def allow_block(self, block: int, message: str) -> None:
        """Note that the windows go through a compressed block whose message has this digest.

        Declined for another than before: the sums behind it would be more of the same tokens, as many as a server likes.
        """
        file = self.folder / CALIBRATED
        before = _noted(file, on=list, blocks=dict)
        if before["blocks"].setdefault(str(block), message) != message:
            raise self._calibrated(before)
        write_atomic(file, json.dumps(before), mode=PRIVATE)

    def _calibrated(self, before: dict[str, Any]) -> Declined:
        hint = f"to allow it, for a server that you would give the rows: remove {self.folder / CALIBRATED}"
        return Declined("calibrated", *before["on"][2:], hint=hint)

    def allow_measurement(self, rows: str, job: Job) -> None:
        """Note that the rows with this digest (of their words) are measured as the job asks.

        Declined where they were measured at another length or with other labels, since the difference shows the tokens at
        which they are cut.  Declined too after `MOST_MEASUREMENTS` different measurements: each tells a few tokens, so many
        tell them all.  Any choice of the server makes a measurement different, not only its result.
        """
        file = self.folder / MEASURED
        before = _noted(file, rows=dict, known=list) if file.exists() else {"rows": {}, "known": []}
        hint = f"to allow it, for a server that you would give the rows: remove {file}"
        cut = [job.max_length, list(job.labels)]
        if (first := before["rows"].setdefault(self.keyed(rows), cut)) != cut:
            raise Declined("measured-at", int(first[0]), hint=hint)
        known = {self.keyed(rows + job.measurement), *before["known"]}
        if len(known) > MOST_MEASUREMENTS:
            raise Declined("measured", MOST_MEASUREMENTS, hint=hint)
        write_atomic(file, json.dumps({"rows": before["rows"], "known": sorted(known)}), mode=PRIVATE)

    def spend(
        self, job: Job, how: Privacy, releases: int, delta: float, budget: float, *, whole: bool = False
    ) -> float:
        """Count releases of a run, replies or local steps; return epsilon so far, of all runs (0: no budget).

        With `whole`, they are all that the run will have, and nothing is written.  Declined, and nothing counted, where they cost
        more than the budget, or than the run says that it costs; or where what another kind of run has told is not counted.
        """
        file, unit = self.folder / PRIVACY, "row" if job.hidden else "reply"
        noted = _noted(file, spent=list)["spent"] if file.exists() else []
        spent = {tuple(key): count for *key, count in noted}
        key = (job.run, unit, how.noise, how.q)
        spent[key] = max(spent.get(key, 0), releases) if whole else spent.get(key, 0) + releases

        def epsilon(delta: float, run: str = "") -> float:
            return mechanism.epsilon_of(
                tuple((z, q, n) for (of, _, z, q), n in spent.items() if run in ("", of)), delta
            )

        if budget and any(of != unit for _, of, _, _ in spent):
            raise Declined("unit", hint=f"what was spent is in {file}")
        total = epsilon(delta) if budget else 0.0
        if total > budget or (job.hidden and epsilon(job.hidden.delta, job.run) > job.hidden.epsilon):
            before = f" with what was spent before ({file})" if noted else ""
            needs = f"the run needs epsilon {total + 0.005:.2f} at delta {delta:g}{before}, this device allows {budget:g}"
            raise Declined("budget", hint=f"{needs}: raise --epsilon" if total > budget else None)
        if not whole:
            write_atomic(file, json.dumps({"spent": [[*k, n] for k, n in spent.items()]}), mode=PRIVATE)
        return total


def _noted(file: Path, **kinds: type) -> dict[str, Any]:
    """Return what was noted in a file; StorageError, which names it, where it is damaged."""
    hint = f"if nothing else wrote into it: remove {file}, which allows its rows anew"
    found = read_json(file, hint)
    if not all(type(found.get(name)) is kind for name, kind in kinds.items()):
        raise StorageError(f"{file} is damaged", hint=hint)
    return found
