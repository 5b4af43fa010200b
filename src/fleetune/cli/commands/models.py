# SPDX-License-Identifier: Apache-2.0
"""`fleetune models`: the built-in models and the cache; `pull NAME` fetches one, `rm NAME` removes one."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleetune.cli.console import Ui
from fleetune.common.display import counted, human_bytes, human_count
from fleetune.common.events import ModelCached, ModelListed, ModelPulled, ModelRemoved
from fleetune.common.shell import command
from fleetune.errors import UsageError
from fleetune.models.cache import cache, cache_contents
from fleetune.models.cache.short_names import SHORT_NAMES, ShortName

HELP = "list the models there are, fetch one, or remove one from the cache"
ORDER = 140
EXAMPLES = """\
fleetune models                     what is built in, and what is in the cache
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
        help="list (default); pull: fetch NAME into the cache; rm: remove NAME from the cache",
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
    elif args.name:
        raise UsageError("models list takes no NAME", hint=command("models", "pull", args.name))
    else:
        _list(ui)


def _list(ui: Ui) -> None:
    found, lying = cache.builtin(), cache_contents.contents()
    sizes = {model.path: model.bytes for model in lying}
    for m in found:
        ui.event(
            ModelListed(
                **{**dataclasses.asdict(m), "cached": str(m.cached) if m.cached else None},
                bytes=sizes.get(m.cached) if m.cached else None,
                download=cache.ORIGINS[m.name].wheel_bytes,
            )
        )
    for s in SHORT_NAMES.values():
        ui.event(
            ModelListed(
                name=s.name,
                hub=s.hub,
                params=int(s.params),
                licence=s.licence,
                cached=None,
                source="",
                about=_of_hub(s),
            )
        )
    others = [model for model in lying if model.path not in [m.cached for m in found]]
    for other in others:
        ui.event(ModelCached(**{**dataclasses.asdict(other), "path": str(other.path)}))
    folders = _folders(lying)
    rows = [
        [
            m.name,
            human_count(m.params),
            m.licence,
            *_where(m, sizes),
            (m.source or m.hub) + folders.get(m.cached, ""),
        ]
        for m in found
    ]
    rows += [[s.name, human_count(s.params), s.licence, _of_hub(s), "", s.hub] for s in SHORT_NAMES.values()]
    rows += [
        [o.name, "", o.licence, "yes", human_bytes(o.bytes), o.source + folders.get(o.path, "")]
        for o in others
    ]
    ui.table(["model", "parameters", "licence", "here", "size", "source"], rows, align="lrllrl")
    ui.paths(
        [
            ("cache", f"{cache.cache()} ({human_bytes(sum(m.bytes for m in lying))})"),
            *_kept(lying),
            ("also", "any hub id, Hugging Face directory or GGUF file is a MODEL"),
        ]
    )


def _folders(lying: Sequence[cache_contents.CachedModel]) -> dict[Path | None, str]:
    """Return path -> ", in FOLDER" of the copies that share their name with another one."""
    copies = Counter(model.name for model in lying)
    return {model.path: f", in {model.path.name}" for model in lying if copies[model.name] > 1}


def _kept(lying: Sequence[cache_contents.CachedModel]) -> list[tuple[str, str]]:
    """Say that copies of GGUF files which were read stay in the cache, and how they are removed; nothing without any."""
    read = [model.bytes for model in lying if model.source.startswith(cache.OF_FILE)]
    if not read:
        return []
    what = (
        f"{counted(len(read), 'copy', 'copies')} made of GGUF files that were read ({human_bytes(sum(read))})"
    )
    return [("kept", f"{what}, until: fleetune models rm NAME   (of several with one name: rm FOLDER)")]


def _of_hub(model: ShortName) -> str:
    """Say where a short name's model comes from, and that the hub asks for an account where it does."""
    return "from the hub, gated" if model.gated else "from the hub"


def _where(model: cache.BuiltIn, sizes: Mapping[Path, int]) -> tuple[str, str]:
    """Return whether a model is here, and the size of it or of its download."""
    if model.cached:
        return "yes", human_bytes(sizes.get(model.cached))
    return "no", human_bytes(cache.ORIGINS[model.name].wheel_bytes)


def _rm(args: argparse.Namespace, ui: Ui) -> None:
    if not args.name:
        raise UsageError("rm needs the name of a model in the cache", hint="what is there: fleetune models")
    for gone in cache_contents.remove(args.name):
        ui.event(ModelRemoved(name=gone.name, path=str(gone.path), bytes=gone.bytes))
        ui.note(f"removed {gone.name} ({human_bytes(gone.bytes)}) from {gone.path}")


def _pull(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune import models

    if not args.name:
        raise UsageError("pull needs the name of a model", hint="fleetune models pull smollm2-135m")
    with ui.bar(args.name, human_bytes) as bar:
        path = models.pull(
            args.name,
            offline=args.offline,
            base=args.base,
            progress=lambda what, n, total: bar.update(n, total, what),
        )
    ui.event(ModelPulled(name=args.name, path=str(path)))
    ui.paths([("result", str(path))])
