"""`fleetune data check FILE`: look at rows before anything is trained on them."""

import argparse
from collections.abc import Mapping

from fleetune.cli import flags
from fleetune.cli.console import Ui
from fleetune.cli.parser import Parser
from fleetune.common.display import clean, one_line, quoted
from fleetune.common.events import DataChecked, RowShown
from fleetune.tuning.prepare import data_check
from fleetune.tuning.recipe import recipe as recipes

HELP = "look at rows before they are trained on: lengths, clients, repeated rows, samples"
ORDER = 25
OPTIONS = (
    "model",
    "columns",
    "strict",
    "dedupe",
    "train_turns",
    "max_length",
    "partition",
    "clients",
    "held_out",
    "eval_data",
    "limit",
    "seed",
)
MODEL = "hub id, HF directory, GGUF file, or a built-in name (fleetune models); lengths are then counted in its tokens"
EXAMPLES = """\
fleetune data check rows.jsonl --model smollm2-135m       lengths in tokens, and what max_length cuts
fleetune data check rows.jsonl --columns prompt=question,response=answer
fleetune data check devices/                              a folder with one file per client
"""
NAMED = 6  # clients that are named


def arguments(sub: Parser) -> None:
    """Add the command's arguments."""
    sub.add_argument("action", metavar="ACTION", choices=["check"], help="check")
    sub.add_argument(
        "data", metavar="DATA", help="as for `fleetune tune`: a file, a folder, a hub id, -, or 'demo'"
    )
    flags.add_some(sub, OPTIONS, {"model": MODEL})


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Check the rows, and print what they are."""
    given = flags.given(args)
    model = given.pop("model", "")
    recipe = recipes.make({"model": model or "none", "data": args.data, **given})
    with ui.bar("reading the rows" + f", and the tokenizer of {model}" * bool(model)):
        found = data_check.check(recipe, model, offline=args.offline)
    ui.event(found)
    _print(found, recipe.data, model, _flags(given), ui)


def _flags(given: Mapping[str, object]) -> str:
    return "".join(f" --{name.replace('_', '-')} {quoted(value)}" for name, value in given.items())


def _print(found: DataChecked, data: str, model: str, flags: str, ui: Ui) -> None:
    lengths = found.lengths
    rows = [
        ("rows", f"{found.rows:,} · {found.training:,} to train on, {found.held_out:,} held out"),
        (
            "length",
            f"{lengths.unit}: half of the rows up to {lengths.p50:,}, 95 % up to {lengths.p95:,}, the longest "
            f"{lengths.longest:,}; {lengths.total:,} in all",
        ),
        *(
            []
            if model
            else [("", f"in tokens, and what max_length={found.max_length} cuts: add --model MODEL")]
        ),
        ("clients", _clients(found)),
    ]
    if found.labels is not None:
        rows.append(
            ("labels", ", ".join(f"{one_line(word)} {count:,}" for word, count in found.labels.items()))
        )
    repeated = f"{found.equal_training:,} training rows are equal to an earlier one"
    rows.append(("repeated", f"{repeated}, {found.equal_held_out:,} held-out rows to a training row"))
    ui.paths(rows)
    for remark in found.remarks:
        ui.paths([("note", clean(remark))])
    for sample in found.samples:
        _show(sample, ui)
    ui.paths([("next", f"fleetune tune {quoted(model) if model else 'MODEL'} {quoted(data)}{flags}")])


def _clients(found: DataChecked) -> str:
    sizes = found.rows_per_client
    spread = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{sizes[0]:,}"
    text = f"{len(sizes):,} · {one_line(found.partition)} · {spread} rows each"
    if found.clients:
        by_size = sorted(zip(sizes, found.clients, strict=True), key=lambda pair: -pair[0])
        text += ": " + ", ".join(f"{one_line(name)} {size:,}" for size, name in by_size[:NAMED])
        text += ", .." if len(by_size) > NAMED else ""
    return text


def _show(sample: RowShown, ui: Ui) -> None:
    """Print a row: the part that is not trained behind dots, the part that is behind bars."""
    whose = f"of client {one_line(sample.client)}" if sample.client else "held out"
    ui.paths([("", ""), (f"row {sample.row:,}", f"{whose} (┊ no loss, ┃ the loss is on this)")])
    lines = [("┊", line) for line in sample.not_trained.split("\n")]
    lines += [("┃", line) for line in sample.trained.split("\n")]
    ui.text("".join(f"   {mark} {clean(line)}\n" for mark, line in lines))
