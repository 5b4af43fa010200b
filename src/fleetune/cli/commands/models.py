"""`fleetune models`: the built-in models and the cache; `pull NAME` fetches one, `rm NAME` removes one."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

from fleetune import models
from fleetune.cli.console import Ui
from fleetune.common.display import command, counted, human_bytes, human_count
from fleetune.common.events import Event, ModelCached, ModelListed, ModelPulled, ModelRemoved
from fleetune.errors import UsageError
from fleetune.models.cache import cache
from fleetune.models.cache.names import SHORT_NAMES

HELP = "list the models there are, fetch one, or remove one from the cache"
ORDER = 140
EXAMPLES = """\
fleetune models                     what is built in, and what is in the cache
fleetune models list qwen           those with this word in their name or source
fleetune models pull smollm2-135m
fleetune models pull smollm2-135m --base mapped    its 4-bit file as it is: 98 MB instead of 538 MB
fleetune models rm smollm2-135m
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=["list", "pull", "rm"],
        help="list (default): all, or those like NAME; pull: fetch NAME into the cache; rm: remove it",
    )
    sub.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a name of the list, or a hub id; rm: or a folder of the cache",
    )
    sub.add_argument(
        "--base",
        choices=["memory", "mapped"],
        default="memory",
        help="pull: mapped keeps a GGUF file as it is, a fifth of the disk, for commands with --base mapped",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List the built-in models and the cache, fetch a model into it, or remove one from it."""
    if args.action == "pull":
        _pull(args, ui)
    elif args.action == "rm":
        _rm(args, ui)
    else:
        _list(args.name or "", ui)


def _list(name: str, ui: Ui) -> None:
    builtin, cached = cache.builtin(), cache.contents()
    sizes: dict[Path | None, int] = {model.path: model.bytes for model in cached}
    copies = Counter(model.name for model in cached)
    folders = {model.path: f", in {model.path.name}" for model in cached if copies[model.name] > 1}
    rows: list[list[object]] = []

    def tell(event: Event, *row: object) -> None:
        if name.lower() in f"{row[0]} {row[-1]}".lower():
            ui.event(event)
            rows.append([*row])

    for m in builtin:
        download = cache.ORIGINS[m.name].wheel_bytes
        here = {"cached": str(m.cached) if m.cached else None, "bytes": sizes.get(m.cached)}
        there, size = "yes" if m.cached else "no", human_bytes(sizes[m.cached] if m.cached else download)
        source = (m.source or m.hub) + (folders.get(m.cached, "") if m.cached else "")
        event = ModelListed(**dataclasses.asdict(m) | here, download=download)
        tell(event, m.name, there, human_count(m.params), size, m.licence, source)
    for s in SHORT_NAMES.values():
        about, count = "from the hub, gated" if s.gated else "from the hub", int(s.params)
        event = ModelListed(
            name=s.name, hub=s.hub, params=count, licence=s.licence, about=about, cached=None, source=""
        )
        tell(event, s.name, about, human_count(s.params), "", s.licence, s.hub)
    for other in [model for model in cached if model.path not in [m.cached for m in builtin]]:
        size, source = human_bytes(other.bytes), other.source + folders.get(other.path, "")
        found = ModelCached(**dataclasses.asdict(other) | {"path": str(other.path)})
        tell(found, other.name, "yes", "", size, other.licence, source)
    if not rows:
        raise UsageError(f"no model here has {name!r} in its name", hint=command("models", "pull", name))
    ui.table(["model", "here", "parameters", "size", "licence", "source"], rows, align="llrrll", spare=2)
    files = [model.bytes for model in cached if model.source.startswith(cache.OF_FILE)]
    copied = f"{counted(len(files), 'copy', 'copies')} made of GGUF files that were read ({human_bytes(sum(files))})"
    kept = f"{copied}, until: fleetune models rm NAME   (of several with one name: rm FOLDER)"
    ui.paths(
        [
            ("cache", f"{cache.cache()} ({human_bytes(sum(m.bytes for m in cached))})"),
            *([("kept", kept)] if files else []),
            ("also", "any hub id, Hugging Face directory or GGUF file is a MODEL"),
        ]
    )


def _rm(args: argparse.Namespace, ui: Ui) -> None:
    if not args.name:
        raise UsageError("rm needs the name of a model in the cache", hint="what is there: fleetune models")
    for gone in cache.remove(args.name):
        ui.event(ModelRemoved(name=gone.name, path=str(gone.path), bytes=gone.bytes))
        ui.note(f"removed {gone.name} ({human_bytes(gone.bytes)}) from {gone.path}")


def _pull(args: argparse.Namespace, ui: Ui) -> None:
    if not args.name:
        raise UsageError("pull needs the name of a model", hint="fleetune models pull smollm2-135m")
    with ui.bar(f"fetching {args.name}", human_bytes) as bar:
        path = models.pull(
            args.name,
            offline=args.offline,
            base=args.base,
            progress=lambda what, n, total: bar.update(n, total, what),
        )
    ui.event(ModelPulled(name=args.name, path=str(path)))
    ui.paths([("result", str(path))])
