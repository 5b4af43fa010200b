"""Prove what a model was made from: base -> ledger or adapter -> codes -> file.

Every link that can be made again exactly is made again, and compared byte for byte: the weights of a ledger from its base, an
exported file by the exporter that wrote it, the codes of a method that needs no text.  Other codes are bound by a digest to the
weights that they were solved from; that they are this method's is declared.  The first link that differs ends it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Final, TypeVar

import torch
from torch import Tensor

from fleetune import compression, models
from fleetune import subject as subjects
from fleetune.common import sums
from fleetune.common.display import changes, counted, quoted
from fleetune.common.events import LinkVerified, Verified
from fleetune.common.ggml import SCALES
from fleetune.deploy import export, release, targets
from fleetune.deploy.again import Again, DiffersError, FirstDifference, difference
from fleetune.deploy.checkpoint import Checkpoint, Tuned
from fleetune.errors import LedgerError, ModelError, UsageError
from fleetune.models import artefact
from fleetune.models.cache.names import MASTER, is_adapter, is_master
from fleetune.models.gguf import header
from fleetune.models.net.model import Model, stored_tensors
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Listener, Silent
from fleetune.seeds import ledger as ledgers
from fleetune.subject import Compressed, Plain, Run, Subject
from fleetune.tuning.result import finished
from fleetune.tuning.run import describe

PROVEN: Final = "proven"
DECLARED: Final = "declared"
AHEAD: Final = 3  # tensors that one reader may be ahead of another
AGAIN: Final = "get it again from where it was made, or make it again"
STAMP: Final = re.compile(rb'"transformers_version": "[\w.+]+"')
FROM: Final = "name what it was made from: --from RUN, COMPRESSION or MODEL"

Links = Iterator[LinkVerified]
T = TypeVar("T")


@dataclass(frozen=True)
class Parents:
    """What a model was made from, where that does not lie beside it, and where runs are looked for."""

    out: Path
    base: str = ""  # the base model
    source: Run | Compressed | None = None
    offline: bool = False
    listener: Listener = dataclasses.field(default_factory=Silent)

    @staticmethod
    def of(names: Sequence[object], out: Path, listener: Listener, *, offline: bool) -> Parents:
        """Find what these names mean: plain models are the base, others the source."""
        found = [subjects.open(name, out) for name in names]
        base = next((each.name for each in found if isinstance(each, Plain)), "")
        source = next((each for each in found if not isinstance(each, Plain)), None)
        return Parents(out, base, source, offline, listener)

    def run(self, run: Run) -> Run:
        """Return a run with its base where it lies now."""
        return dataclasses.replace(run, base=self.base) if self.base else run


def told(name: str, parents: Parents, *, signer: str = "") -> Links:
    """Yield `links`, and let the listener hear of each, and of the end."""
    states = []
    for link in links(name, parents, signer=signer):
        parents.listener.event(link)
        states.append(link.state)
        yield link
    proven = states.count(PROVEN)
    parents.listener.event(Verified(subject=name, proven=proven, declared=len(states) - proven))


def links(name: str, parents: Parents, *, signer: str = "") -> Links:
    """Yield what is proven and what is declared of `name`: a run, a compression, a model, a release, a file or a folder.

    With `signer` (a fingerprint, a public key or its file) it must be a release that this key has signed.  FleetuneError (of a
    ledger LedgerError, of a model ModelError) at the first thing that differs; UsageError where nothing can be verified.
    """
    path = Path(name)
    if signer or (path / release.SIGNATURE).is_file():
        yield from _of_release(path, parents, signer)
    elif name != rundir.LATEST and path.is_file():
        yield from _of_file(path, parents)
    elif is_adapter(path):
        yield from _of_adapter(path, parents)
    else:
        found = subjects.open(name, parents.out)
        if isinstance(found, Run):
            yield from _of_run(found, parents)
        elif isinstance(found, Compressed):
            yield from _of_compressed(found, parents)
        else:
            folder = path if path.is_dir() else models.resolve(name, offline=True)
            yield from _of_folder(folder, parents)


def _proven(what: str, words: str) -> LinkVerified:
    return LinkVerified(state=PROVEN, what=what, words=words)


def _declared(what: str, words: str) -> LinkVerified:
    return LinkVerified(state=DECLARED, what=what, words=words)


def _base(name: str, digest: str) -> LinkVerified:
    return _proven("base", f"{name} has the weights and the tokenizer that it was made on: {digest}")


# ---------------------------------------------------------------- files as they were written


def _files(folder: Path, *, alone: bool = False) -> Links:
    """Compare files with the list in their folder; ModelError that names all that are not as they were written.

    With `alone`, no other may lie beside them.
    """
    if not (folder / sums.FILE).exists():
        return
    if found := [words for _, words in sums.faults(folder)]:
        raise ModelError("\n  ".join(found), hint=AGAIN)
    if alone and (odd := [name for name in sums.unlisted(folder) if name != sums.README]):
        raise ModelError(
            f"{folder / odd[0]} is not of what was written: {sums.FILE} does not name it", hint="remove it"
        )
    count = (folder / sums.FILE).read_bytes().count(b"\n")
    yield _proven(f"files of {folder.name}", f"{count}, all as they were written")


def _of_release(folder: Path, parents: Parents, signer: str) -> Links:
    key = release.check(folder, signer)
    yield _proven("signature", f"{key} has signed the list of all files")
    if not signer:
        yield _declared("signer", "compare that fingerprint with the one that you know, or give it: --signer")
    yield from _of_run(Run(folder), parents)


def _of_folder(folder: Path, parents: Parents) -> Links:
    """A plain model or any other folder: by what it was made from, else by the lists in it."""
    if (source := _source_of(folder, parents)) is not None:
        yield from _of_export(folder, source, parents)
        return
    lists = sorted(folder.rglob(sums.FILE))
    if not lists:
        raise UsageError(f"{folder} does not say what it was made from, and has no {sums.FILE}", hint=FROM)
    for file in lists:
        yield from _files(file.parent)
    named = {p.parent / line[66:] for p in lists for line in p.read_text("utf-8").splitlines()}
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in sums.LEFT_OUT]
    if odd := sorted(p for p in files if p.parts[0][0] != "." and folder / p not in named):
        yield _declared("other files", f"{len(odd)} that no {sums.FILE} names, {folder / odd[0]} first")
    yield _declared("origin", "these files are those that were written; what made them is not known here")


def _of_file(path: Path, parents: Parents) -> Links:
    """A ledger, or a model's file."""
    if path.suffix != export.GGUF and _is_ledger(path):
        run = path.parent if (path.parent / "run.toml").is_file() else None
        if not parents.base and run is None:
            raise UsageError(f"which base model does {path} belong to?", hint="name it: --from MODEL")
        yield from _of_ledger(path, parents.base or finished.recipe_of(path.parent).model, parents)
        return
    whole = path if path.suffix == export.GGUF else path.parent
    if path.name == sums.FILE or is_master(whole) or is_adapter(whole):
        yield from links(str(whole), parents)
        return
    if (source := _source_of(whole, parents)) is None:
        raise UsageError(f"{path} does not say what it was made from, or that is not here", hint=FROM)
    yield from _of_export(whole, source, parents)


def _is_ledger(path: Path) -> bool:
    """Whether a file is to be read as a ledger: it says so, or has the name of a run's."""
    with path.open("rb") as file:
        return path.name == finished.RESULT["ledger"] or ledgers.NAME.encode() in file.read(1 << 16)


# ---------------------------------------------------------------- weights from a base


def _of_ledger(path: Path, base: str, parents: Parents) -> Links:
    """Rebuild the weights after every round of which a ledger states a digest."""
    ledger = ledgers.load(path)
    if not ledger.head.checks:
        raise LedgerError(
            f"{path} states no digest, so there is nothing to verify",
            hint=f"fleetune ledger replay {quoted(path)}   prints the digest of what it rebuilds, to compare yourself",
        )
    finished.stated_points(ledger)  # too many are refused before the base is loaded

    try:
        model = finished.base_of(ledger, base, offline=parents.offline)
    except Exception:
        yield from _files_of_base(base, parents)  # what differs in them is told before any other error
        raise
    rebuilt = partial(finished.verify, model, ledger, listener=parents.listener)
    digest, checks = yield from _beside_files(base, parents, rebuilt)
    yield _base(base, model.digest)
    if wrong := [r for r, same in checks.items() if not same]:
        raise LedgerError(
            f"after round {wrong[0]} {path} states other weights than it rebuilds ({len(wrong)} of {len(checks)} checks)",
            hint="the ledger was changed after it was made: get it again from its origin",
        )
    last, found = max(checks), f"{len(checks)} of {len(checks)} stated digests found again"
    entries = counted(int((ledger.rounds <= last).sum()), "entry", "entries")
    yield _proven("weights", f"rebuilt from base and {entries}; {found}: {ledger.head.checks[str(last)]}")
    if ledger.final_check() is None:
        yield _declared("later rounds", f"no digest is stated after round {last}; the last gives {digest}")


def _of_adapter(folder: Path, parents: Parents) -> Links:
    if (folder.parent / "run.toml").is_file():
        yield from _of_run(Run(folder.parent), parents)
        return
    if not (folder / sums.FILE).is_file():
        raise UsageError(f"{folder} has no {sums.FILE}", hint="verify the run that it is of")
    yield from _files(folder, alone=True)
    yield _declared(
        "base", "an adapter alone proves neither its base nor its run: verify the run, or a release"
    )


def _of_run(run: Run, parents: Parents) -> Links:
    run = parents.run(run)
    yield from _files_of_run(run)
    result = run.result
    if result.is_dir():
        model = yield from _beside_files(run.recipe.model, parents, lambda: run.load(offline=parents.offline))
        yield from _weights_of(run, model.digest, "")
    else:
        yield from _of_ledger(result, run.recipe.model, parents)
        yield from _declared_by(run)


def _files_of_base(name: str, parents: Parents) -> Links:
    """Compare the files of a base model, where they were listed when it was fetched."""
    if name.endswith(export.GGUF):
        return iter(())
    try:
        folder = Path(name) if Path(name).is_dir() else models.resolve(name, offline=parents.offline)
    except ModelError as error:
        raise ModelError(error.message, hint="name where the base lies: --from MODEL") from error
    return _files(folder)


def _beside_files(base: str, parents: Parents, work: Callable[[], T]) -> Generator[LinkVerified, None, T]:
    """Work while a thread compares the files of a base; what differs in them is told before any other error."""
    with ThreadPoolExecutor(1) as pool:
        files = pool.submit(list, _files_of_base(base, parents))
        try:
            done = work()
        finally:
            found = files.result()
    yield from found
    return done


def _files_of_run(run: Run) -> Links:
    """Compare the files of a run, and its result with what its last event states of it."""
    yield from _files(run.folder)
    done, result = finished.stated_by(run.folder), run.result
    if result.is_dir():
        yield from _files(result, alone=True)
    listed = result / sums.FILE if result.is_dir() else result
    if (stated := done.get("result_sha256")) and stated != (now := sums.sha256(listed)):
        then, now = sums.apart(str(stated), now)
        raise ModelError(f"{run.folder} states {then} of {listed.name}, which is {now}", hint=AGAIN)


def _weights_of(run: Run, base: str, digest: str) -> Links:
    """Of a run that was loaded, on a base of one digest, and whose tuned weights have the other (an adapter's: any)."""
    if run.result.is_dir():  # loading has compared digests of the base
        yield _base(run.recipe.model, base)
        stated = finished.stated_by(run.folder).get("digest", "")
        yield _declared("adapter", f"made by training, which nothing repeats exactly: {stated}")
    else:
        finished.require_digest(digest, run.ledger().final_check(), run.result)
        yield _base(run.recipe.model, base)
        yield _rebuilt(run, digest)
    yield from _declared_by(run)


def _rebuilt(run: Run, digest: str = "not computed") -> LinkVerified:
    stated = run.ledger().final_check()  # which was compared
    what = f"as it states: {stated}" if stated else f"which states no digest; theirs is {digest}"
    return _proven("weights", f"rebuilt from base and ledger, {what}")


def _declared_by(run: Run) -> Links:
    """What a run says of itself, and nobody can compute again from the result; ModelError for what no run says."""
    done, recipe = finished.stated_by(run.folder), run.recipe
    start = next((e for e in rundir.events(run.folder) if e["event"] == "start"), {})
    try:
        rows = [int(n) for n in start.get("rows_per_client", ())]
        of = f"{f'{sum(rows):,}' if rows else 'the'} training rows of {counted(int(start.get('clients', 0)), 'client')}"
        measures = ", ".join(changes(done.get("base", {}), done.get("tuned", {})))
        held = f"{done.get('rows', 0):,} held-out rows"
        private = [str(r) for r in done.get("remarks", ()) if str(r).startswith("differential privacy")]
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(f"{run.folder / rundir.METRICS} is damaged ({error})", hint=AGAIN) from error
    if run.result.is_file() and (head := run.ledger().head.privacy) != " ".join(private or ["none"]):
        raise ModelError(f"{run.folder} states another privacy than its ledger: {head}", hint=AGAIN)
    yield _declared("data, clients", f"{describe.public(recipe.data)}; {of}; {recipe.method}")
    yield _declared("measures", f"{measures} on {held}")
    yield from (_declared("privacy", remark.partition(": ")[2]) for remark in private)


# ---------------------------------------------------------------- codes from weights


def _of_compressed(found: Compressed, parents: Parents) -> Links:
    model = found.artefact or found.home / "model"
    yield from _files(model, alone=True)
    if compression_folder.is_one(model.parent):
        found = Compressed(model.parent)
    model, request = found.model, found.request
    if found.folder is not None:
        stated = compression_folder.record(found.folder).get("result", {}).get("result_sha256")
        if stated not in (None, now := sums.sha256(model / sums.FILE)):
            then, now = sums.apart(str(stated), now)
            raise ModelError(f"{found.folder} states {then} of its model's files, not {now}", hint=AGAIN)
    source: Run | str | None = parents.source if isinstance(parents.source, Run) else found.run
    if source is None and not (request and request.run):
        source = parents.base or (request.model if request else None)
    if not found.holds_codes:
        made = (
            f"{request.method} of {describe.public(request.model)}" if request else "its origin is not known"
        )
        yield _declared("weights", f"{made}; nothing repeats that exactly")
        return
    master = artefact.Master(model)
    if source is not None:
        yield from _bound(master, source, request.dtype if request else "fp32", parents)
        return
    yield _declared("compressed from", f"weights {master.head.base}, which are not here (--from)")
    yield _declared("codes", _made(master.head))


def _made(head: artefact.ArtefactHead) -> str:
    each = "grid" not in head.settings  # has its own, within a size
    settings = [f"{n} {v}" for n, v in head.settings.items() if not (each and n in ("bits", "group"))]
    if each:
        named = {**head.codebooks, **head.superblocks}
        kinds = Counter(named.get(name, f"{bits} bits") for name, (bits, _) in head.grids.items())
        settings += [f"{count} of {kind}" for kind, count in kinds.most_common()]
    text = ", ".join(f"{n} {v}" for n, v in head.calibration.items())
    text += " and their own rows, without noise for privacy" * ("clients" in head.calibration)
    made = f"{counted(len(head.grids), 'matrix', 'matrices')} by {head.method} ({', '.join(settings)})"
    return f"{made}; calibrated on {text}" if text else made


def _bound(master: artefact.Master, source: Run | str, dtype: str, parents: Parents) -> Links:
    """Compare an artefact with the weights that it was made from: their digest, what has no codes, and codes that are exact."""
    codes = HeldCodes(master)
    if isinstance(source, Run):
        run = parents.run(source)
        yield from _files_of_run(run)
        model = yield from _beside_files(run.recipe.model, parents, lambda: run.load(offline=parents.offline))
        base = model.digest
        model.digest = models.digest(codes.passing(Tuned(model).tensors()))
        yield from _weights_of(run, base, model.digest)
    else:
        model = models.load(source, dtype=dtype, device="cpu", offline=parents.offline)
    head, name = master.head, source.folder if isinstance(source, Run) else source
    for what, stated, now in (
        ("weights", head.base, model.digest),
        ("tokenizer", head.tokenizer, model.tokenizer_digest),
    ):
        if stated != now:
            then, found = sums.apart(stated, now)
            raise ModelError(
                f"{master.folder} was made from {what} {then}, those of {name} are {found}", hint=FROM
            )
    yield _proven("compressed from", f"{name}: {head.base}")
    names = dict(codes.passing(stored_tensors(model.net))).keys()
    if other := sorted(names ^ set(master.names)):
        has, lacks = (name, master.folder) if other[0] in names else (master.folder, name)
        raise ModelError(f"{other[0]} is in {has}, and not in {lacks}", hint=AGAIN)
    yield _beside(master.folder, model, name)
    odd = sorted(codes.left - head.grids.keys())
    if odd and head.grids:
        raise ModelError(
            f"{master.folder}: {odd[0]}, which holds no codes, is not that of {name}", hint=AGAIN
        )
    same = len(master.names) - len(head.grids) - len(odd)
    yield _proven("other tensors", f"{same} are those of the source, bit for bit")
    if odd:
        yield _declared("pruned tensors", f"{len(odd)} by {head.method}")
    elif head.grids and not codes.left:
        yield _proven("codes", f"{_made(head)}: solved again, every code and scale is equal")
    else:
        yield _declared("codes", _made(head))


def _beside(folder: Path, model: Model, name: object) -> LinkVerified:
    """Write what an artefact holds beside its weights again, and compare; ModelError for the first file that differs."""
    with TemporaryDirectory() as place:
        made = Path(place)
        artefact.write_beside(made, model)
        for file in made.glob("*config.json"):  # whose stamp is no setting
            there = folder / file.name
            if there.is_file() and (stated := STAMP.search(there.read_bytes())):
                file.write_bytes(STAMP.sub(stated[0], file.read_bytes(), 1))
        found = difference(folder, made, {MASTER, sums.FILE} & {p.name for p in folder.iterdir()})
    if found.words:
        hint = f"{AGAIN}; another version of transformers may write other files"
        raise ModelError(f"{found.words}: {name} gives something else", hint=hint)
    return _proven("configuration", f"it and the tokenizer, written again from {name}: every byte is equal")


class HeldCodes:
    """What an artefact holds, compared with the weights that it was made from as they come."""

    def __init__(self, master: artefact.Master) -> None:
        self.master, self.seen, made = master, set[str](), None
        self.left = set(master.names)  # what has not been found to be the source's
        if not master.head.calibration:
            with suppress(UsageError):  # settings beside the method's own: a budget, trained scales
                made = compression.make(master.head.method, master.head.settings)
        self.solver = made if isinstance(made, compression.Solver) and not made.data else None

    def passing(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors; one that came before is not looked at again."""
        for name, tensor in tensors:
            if name in self.left and name not in self.seen and self._is_of(name, tensor):
                self.left.remove(name)
            self.seen.add(name)
            yield name, tensor

    def _is_of(self, name: str, W: Tensor) -> bool:
        if name not in self.master.head.grids:
            held = self.master.weight(name)
            return held.dtype == W.dtype and torch.equal(held, W)
        if self.solver is None or W.dim() != 2 or self.solver.check(name, *W.shape):
            return False
        nothing = torch.zeros(()).expand(W.shape[1], W.shape[1])  # takes no memory
        again, found = self.solver.solve(W.detach().float(), nothing).weight, self.master.quantised(name)
        return isinstance(again, artefact.Quantised) and found is not None and again.equals(found)


# ---------------------------------------------------------------- a file from codes or weights


def _source_of(path: Path, parents: Parents) -> Subject | None:
    """Return what an exported file or folder was made from: what is named, what it lies in, the artefact that it states."""
    if parents.source is not None:
        return parents.source
    place = path.absolute().parent
    if (place / "run.toml").is_file() and path.name != finished.RESULT["adapter"]:
        return Run(path.parent)
    if compression_folder.is_one(place):
        return None if path.name in ("model", "base") else Compressed(path.parent)
    for folder in (path.parent, path.parent / "model"):
        if is_master(folder):
            return Compressed(None, folder)
    if path.suffix == export.GGUF and (stated := header.read(path).values.get("fleetune.artefact_digest")):
        for folder in compression_folder.listing(parents.out):
            listed = folder / "model" / sums.FILE
            if listed.is_file() and str(stated) in listed.read_text(encoding="utf-8"):
                return Compressed(folder)
    return Plain(parents.base) if parents.base else None


def _of_export(path: Path, source: Subject, parents: Parents) -> Links:
    """Write an export again from its source, and compare."""
    if isinstance(source, Compressed):
        again = partial(written_again, path, source, offline=parents.offline)
        with ThreadPoolExecutor(1) as pool:  # codes give a file, whatever they were made from
            done = pool.submit(again) if path.is_file() else None  # a folder's template may never end
            yield from _of_compressed(source, parents)
        target = done.result() if done else again()
    elif isinstance(source, Run):
        target = yield from _of_tuned(path, parents.run(source), parents)
    else:
        target = written_again(path, source, offline=parents.offline)
    yield _proven(path.name, f"written again as {target} from {source.argument}: every byte is equal")


def _of_tuned(path: Path, run: Run, parents: Parents) -> Generator[LinkVerified, None, str]:
    """Write the export of a run again, and compare; return its target."""
    yield from _files_of_run(run)
    adapter, digest = run.result.is_dir(), ""
    if run.recipe.train == SCALES and not adapter:
        yield from _files_of_base(run.recipe.model, parents)
        target = written_again(path, run, offline=parents.offline)  # which compares what the ledger states
        yield _rebuilt(run)
        yield _base(run.recipe.model, run.ledger().head.base)
        yield from _declared_by(run)
        return target
    model = yield from _beside_files(run.recipe.model, parents, lambda: run.load(offline=parents.offline))
    tuned = None if run.recipe.train == SCALES else Tuned(model)
    with ThreadPoolExecutor(1) as pool:
        if tuned and not adapter:
            tuned.moved = made_once(tuned.moved)
        again = pool.submit(written_again, path, run, tuned, offline=parents.offline)
        if tuned and not adapter:
            digest = models.digest(tuned.tensors())
        yield from _weights_of(run, model.digest, digest)
    target = again.result()
    if adapter:
        yield _proven("weights", "made from base and adapter")
    return target


def made_once(moved: Mapping[int, Callable[[], Tensor]]) -> dict[int, Callable[[], Tensor]]:
    """Make each tensor once for two readers in threads, which go in one order: what one has made, the other takes."""
    made, lock = dict[int, Tensor](), Lock()

    def make(at: int) -> Tensor:
        with lock:
            if (found := made.pop(at, None)) is None:
                if len(made) == AHEAD:
                    del made[next(iter(made))]
                found = made[at] = moved[at]()
        return found

    return {at: partial(make, at) for at in moved}


def written_again(path: Path, source: Subject, tuned: Tuned | None = None, *, offline: bool) -> str:
    """Return the target as which `source` gives the very bytes of `path`; ModelError with the first place that differs."""
    nearest = FirstDifference(-1, "")
    with ExitStack() as stack:

        @cache
        def opened() -> tuple[Checkpoint, Mapping[str, str]]:
            return stack.enter_context(export.opened(source, tuned, offline=offline))

        for target, name, usual in _ways(path, source):
            with TemporaryDirectory() as place:
                try:
                    made, again = Path(place) / name, Again(path)
                    if isinstance(source, Run) and (tuned is None or target.takes == "adapter"):
                        export.export(source, target.name, made, None, Silent(), offline=offline)
                    elif tuned is not None and target.name == export.DEFAULT_TARGET_OF_A_RUN:
                        export.compare_tuned(tuned, again, made)
                    else:
                        export.compare(opened()[0], target, again, made, opened()[1])
                    found, alike = _rest(path, made, again.seen)
                except DiffersError as error:
                    found, alike = error.found, not error.head
                except UsageError as error:
                    if isinstance(error, ModelError):
                        raise
                    continue  # no target of this source
            if not found.words:
                return target.name
            nearest = max(nearest, found)
            if usual and alike:
                break  # it is of this target, and damaged
    if not nearest.words:
        raise UsageError(f"{source.argument} is exported as nothing like {path}", hint=FROM)
    raise ModelError(
        f"{nearest.words}: {source.argument} gives something else",
        hint="export it again; a file that was renamed holds its first name: give it that",
    )


def _rest(path: Path, made: Path, seen: set[str]) -> tuple[FirstDifference, bool]:
    """Compare what was not `seen`; tell also whether `path` is what `made` is, perhaps damaged."""
    size = compression_folder.size
    if seen and path.is_file():
        return FirstDifference(path.stat().st_size, ""), True
    return difference(path, made, seen), bool(seen) or size(path) == size(made)


def _ways(path: Path, source: Subject) -> list[tuple[targets.Target, str, bool]]:
    """Return the targets that `path` may be of, with the name that the file had, and whether that is the target's usual one."""
    stem = ""
    if isinstance(source, Run):
        home = source.folder
    elif isinstance(source, Compressed):
        home = source.home
    else:
        home, stem = Path("."), rundir.of_model(source.name)
    able = [
        target
        for target in targets.every().values()
        if target.suffix == ("" if path.is_dir() else path.suffix)
        and (target.takes != "codes" or isinstance(source, Compressed))
        and (target.takes != "adapter" or isinstance(source, Run))
    ]
    usual = {target.name: target.place(home, stem).name for target in able}
    names = [path.name]
    if path.suffix == export.GGUF:  # which holds the name that it was written under
        with suppress(ModelError):  # of a damaged head, whose first byte that differs is found
            own = header.read(path).values.get("general.name")
            names += {name for name in usual.values() if Path(name).stem == own} - {path.name}
    ways = [(target, name, usual[target.name] == path.name) for name in names for target in able]
    return sorted(ways, key=lambda way: not way[2])
