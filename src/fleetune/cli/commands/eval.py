"""`fleetune eval`: a model, a finished run or a compressed one, on given rows or on its own held-out ones."""

import argparse

import fleetune
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.common.display import change, is_noise
from fleetune.common.events import EvalDone
from fleetune.errors import RecipeError

HELP = "measure a model, a finished run or a compressed one"
ORDER = 50
EXAMPLES = """\
fleetune eval latest --tasks loss,rouge
fleetune eval smollm2-135m rows.jsonl --limit 100
fleetune eval latest --tasks perplexity --text book.txt
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("model", metavar="RUN|FOLDER|MODEL", help="what to measure")
    sub.add_argument(
        "data", metavar="DATA", nargs="?", help="rows to measure on (a run: its own held-out rows)"
    )
    sub.add_argument(
        "--tasks",
        help="loss, rouge, f1, em, accuracy, perplexity (default loss,rouge; of an encoder loss,accuracy; with "
        "--text perplexity too)",
    )
    sub.add_argument(
        "--columns",
        default="",
        metavar="NAME=COLUMN,..",
        help="which columns of DATA are which, as in prompt=question,response=answer (default: as the run read its own)",
    )
    sub.add_argument("--limit", type=int, default=200, help="most rows (default 200)")
    sub.add_argument("--answer-tokens", type=int, default=96, help="most tokens per answer (default 96)")
    sub.add_argument(
        "--text",
        help="plain text file for perplexity (without one it is that of the answers of the rows, without their prompts)",
    )
    sub.add_argument("--labels", help="label words for accuracy, comma-separated (a comma in a word: \\,)")
    sub.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the weights (default fp32; a run has its own)",
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    sub.add_argument(
        "--base",
        choices=["auto", "memory", "mapped"],
        help="where the base's weights are: memory, or mapped, in their file (default auto; a run: as while it was tuned)",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Measure, and print value by task."""
    tasks = [t.strip() for t in (args.tasks or "").split(",") if t.strip()]
    if args.tasks is not None and not tasks:
        raise RecipeError(["--tasks names no task"], hint="fleetune eval --help")
    with console_listener(ui, resumes=False) as listener:
        fleetune.evaluate(
            args.model,
            args.data,
            tasks=tasks,
            labels=args.labels or "",
            listener=listener,
            **flags.options(args, "columns limit text answer_tokens dtype device base"),
        )
    done = listener.last
    if isinstance(done, EvalDone) and not ui.json:
        rows = _rows(done, own=not args.data)
        named = {k: k + rows for k in done.values}
        named |= {
            "perplexity": "perplexity" if args.text else f"perplexity of the answers without prompts{rows}"
        }
        ui.table(
            ["task", "value"] if done.base_loss is None else ["task", "base", "value", "change"],
            [_line(done, k, named[k], v) for k, v in done.values.items()],
        )


def _line(done: EvalDone, name: str, label: str, value: float) -> list[object]:
    if done.base_loss is None:
        error = f" ± {done.loss_error:.4f}" if name == "loss" and done.loss_error is not None else ""
        return [label, f"{value:.4f}{error}" if error else round(value, 4)]
    if name != "loss":
        return [label, "", round(value, 4), ""]
    words = change(name, done.base_loss, value, done.change_error)
    noise = ", within noise" if is_noise(name, done.base_loss, value, done.change_error) else ""
    return [label, round(done.base_loss, 4), round(value, 4), words + noise]


def _rows(done: EvalDone, *, own: bool) -> str:
    """The rows behind a measure: ", 200 of 1,760 held-out rows"; "" for none."""
    if not done.of:
        return ""
    count = f"{done.rows:,} of {done.of:,}" if done.rows < done.of else f"{done.rows:,}"
    return f", {count} {'held-out ' if own else ''}{'row' if done.of == 1 else 'rows'}"
