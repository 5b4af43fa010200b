"""Write a model card from what a finished run recorded, with the Hub's front matter (`huggingface_hub.ModelCardData`).

A card has no row of the data, no name of a client and no path of the machine.
"""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData

from fleetune.common import __version__
from fleetune.common.display import counted, human_bytes, show
from fleetune.common.files import PRIVATE, read_text, write_atomic
from fleetune.common.settings import Value
from fleetune.models.cache import names
from fleetune.runs import rundir
from fleetune.tuning import methods
from fleetune.tuning.prepare import private
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import finished, foundations
from fleetune.tuning.run import describe

HERE: Final = "PATH OF THIS FOLDER"
CARD: Final = "README.md"
TAGS: Final = ("fleetune", "federated-learning")


def of_run(run: Path, *, encoder: bool = False) -> str:
    """Return the card of a run's whole model, for a directory of transformers; `encoder`: it classifies."""
    recipe = finished.recipe_of(run)
    base = base_name(recipe)
    head = _front_matter(
        recipe, library="transformers", tags=(), task="text-classification" if encoder else "text-generation"
    )
    auto = "AutoModelForSequenceClassification" if encoder else "AutoModelForCausalLM"
    about = _about(run, recipe, finished.stated_by(run))
    title = f"# {base.rpartition('/')[2]}, tuned with {recipe.method}"
    return f"{head}\n{title}\n\n{about}\n{LOAD.format(auto=auto, here=HERE)}"


def of_release(run: Path) -> str:
    """Return the card of a run's release: the run itself, which stands on its base model."""
    recipe = finished.recipe_of(run)
    base, adapter = base_name(recipe), finished.result_of(run).is_dir()
    head = _front_matter(recipe, library="peft" if adapter else "fleetune", tags=())
    what = (
        "an adapter (`adapter/`; PEFT loads most)"
        if adapter
        else "a seed ledger, from which the weights are rebuilt,"
    )
    about = _about(run, recipe, finished.stated_by(run))
    return f"{head}\n# {base.rpartition('/')[2]}, tuned with {recipe.method}\n\n{about}\n{USE.format(what=what, base=base)}"


def complete(adapter: Path, done: Mapping[str, Any]) -> int:
    """Complete the card in a run's `adapter` folder, which says how to load it; return the folder's bytes now.

    `done` is the run's last event, which need not be recorded yet.
    """
    run, file = adapter.parent, adapter / CARD
    recipe = finished.recipe_of(run)
    own: Any = ModelCard(read_text(file), ignore_metadata_errors=True)
    data = own.data.to_dict()
    head = _front_matter(
        recipe,
        library=str(data.get("library_name", "peft")),
        tags=tuple(data.get("tags") or ()),
        base=str(data.get("base_model", "")),
    )
    body = own.text.strip().partition(_MARK)[0].rstrip()
    write_atomic(file, f"{head}\n{body}\n\n{_MARK}\n\n{_about(run, recipe, done)}", mode=PRIVATE)
    return sum(path.stat().st_size for path in adapter.iterdir())


_MARK: Final = "<!-- what the run recorded -->"


def base_name(recipe: Recipe) -> str:
    """Return the base model as others know it: its hub id, or the last part of its path."""
    return names.hub_of(recipe.model) or describe.public(recipe.model)


def licence_of(recipe: Recipe) -> str | None:
    """Return the licence of the base: of a name that is known, or as the card in its folder states; None where neither does."""
    if known := names.licence_of(recipe.model):
        return known
    card = Path(recipe.model).expanduser() / CARD
    try:
        found: Any = ModelCard(read_text(card), ignore_metadata_errors=True)
        stated = found.data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return str(stated) if stated else None


def command_of(recipe: Recipe) -> str:
    """Return the command that repeats the run, with what differs from the defaults; files by their last part."""
    words = [
        "fleetune",
        "tune",
        recipe.model if names.hub_of(recipe.model) else describe.public(recipe.model),
    ]
    words += [describe.public(recipe.data), "--method", recipe.method]
    for name, (_, default, _) in recipes.fields().items():
        value = getattr(recipe, name)
        if name not in ("model", "data", "method", "set") and value != default:
            text = describe.public(value) if name in describe.NAMED else _plain(value)
            words += [f"--{name.replace('_', '-')}", text]
    known = recipe.method in methods.entries()
    usual = {s.name: s.default for s in methods.settings(recipe.method)} if known else {}
    for name, value in describe.settings_of(recipe).items():
        if value != usual.get(name):
            words += ["--set", f"{name}={_plain(value)}"]
    return shlex.join(words)


def _plain(value: Value) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _front_matter(
    recipe: Recipe, *, library: str, tags: Sequence[str], task: str | None = None, base: str = ""
) -> str:
    """Return the YAML between two lines of dashes; a base that is no hub id is not linked."""
    name = base or base_name(recipe)
    data = ModelCardData(
        base_model=name if base or "/" in name else None,
        license=licence_of(recipe),
        library_name=library,
        pipeline_tag=task,
        tags=list(dict.fromkeys([*tags, *TAGS, recipe.method])),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _about(run: Path, recipe: Recipe, done: Mapping[str, Any]) -> str:
    start = next((e for e in rundir.events(run) if e["event"] == "start"), {})
    licence = licence_of(recipe)
    parts = [
        f"Made by Fleetune {__version__} from {base_name(recipe)}.  Licence of the base: {licence or 'not known here'}.",
        "## Result",
        _results(done),
        "## Data",
        _table(["", ""], _data(run, recipe, start)),
        "## Method",
        _method(recipe, start, done, of_devices=_of_devices(run)),
        "## Digests",
        _table(["SHA-256 of", ""], [[what, f"`{hex}`"] for what, hex in _digests(run, done)]),
    ]
    return "\n\n".join(parts) + "\n"


def _results(done: Mapping[str, Any]) -> str:
    base, tuned = done.get("base", {}), done.get("tuned", {})
    rows = [[n.replace("_", " "), show(n, base.get(n)), show(n, v)] for n, v in tuned.items()]
    table = _table([f"on {done.get('rows', 0):,} held-out rows", "base", "tuned"], rows)
    notes = [f"- {public_text(str(remark))}" for remark in done.get("remarks", ())]
    return "\n\n".join([table, "Losses are in nats per token.", *(["\n".join(notes)] if notes else [])])


def _data(run: Path, recipe: Recipe, start: Mapping[str, Any]) -> list[list[str]]:
    counts = [int(n) for n in start.get("rows_per_client", ())]
    clients = counted(int(start.get("clients", 0)), "client")
    of = "their own rows of real devices" if _of_devices(run) else recipe.partition
    rows = [
        ["data of the server" if _of_devices(run) else "data", describe.public(recipe.data)],
        ["training rows", f"{f'{sum(counts):,}' if counts else 'those'} of {clients} ({of})"],
        ["held-out rows", f"{start.get('held_out', 0):,}"],
        ["tokens per row, max.", f"{recipe.max_length:,}"],
    ]
    if recipe.eval_data:
        rows.append(["held-out data", describe.public(recipe.eval_data)])
    return rows


def _of_devices(run: Path) -> bool:
    return (run / rundir.FLEET).is_file()


def _method(recipe: Recipe, start: Mapping[str, Any], done: Mapping[str, Any], *, of_devices: bool) -> str:
    known = methods.entries().get(recipe.method)
    paper = f" ({known.paper})" if known and known.paper else ""
    settings = [[f"`{name}`", str(value)] for name, value in describe.settings_of(recipe).items()]
    rounds = done.get("rounds", recipe.rounds)
    up, down = (done.get(f"bytes_{way}", 0) for way in ("up", "down"))
    told = recipe.privacy != private.CLIENT  # else they tell how many clients took part
    return "\n\n".join(
        [
            f"{recipe.method}{paper}: {counted(rounds, 'round')}, {counted(int(start.get('clients', 0)), 'client')}, "
            f"share of the clients per round {recipe.participation:g}, seed {recipe.seed}, {recipe.dtype}; "
            f"{start.get('trained', 0):,} numbers trained, of a model of {start.get('params', 0):,}"
            + (f"; uplink {human_bytes(up)}, downlink {human_bytes(down)} in all." if told else "."),
            *(
                ["Trained on real devices, which keep their rows."]
                if of_devices
                else [textwrap.indent(command_of(recipe), "    ")]
            ),
            _table(["setting", ""], settings),
        ]
    )


def _digests(run: Path, done: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = rundir.made_on(run)
    named = [("base weights, as loaded", found["base"]), ("tokenizer", found["tokenizer"])]
    if stands_on := foundations.stated_by(run):
        if finished.recipe_of(run).privacy == private.NONE:  # or the digest would confirm a guess of the rows
            named += [("training rows, as text", stands_on.rows_text)]
        named += [("held-out rows, as text", stands_on.held_out_text)]
    named += [("tuned weights or adapter", str(done.get("digest", "")))]
    named += [("the run's ledger, or its adapter's SHA256SUMS", str(done.get("result_sha256", "")))]
    return [(what, hex) for what, hex in named if hex]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def public_text(text: str) -> str:
    """A remark without paths: an absolute one is cut to its last part."""
    return re.sub(
        r"(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\`'\",;:]+){2,}", lambda m: re.split(r"[/\\]", m[0])[-1], text
    )


LOAD: Final = """## Load it

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
```
"""


USE: Final = """## Use it

This folder is {what} and stands on its base model, {base}.  Check it first; `--signer` takes the fingerprint of its maker's key:

    fleetune verify FOLDER --from {base} --signer SHA256:..
    fleetune export FOLDER --to hf
    fleetune chat FOLDER
"""
