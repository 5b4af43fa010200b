"""Write the report page of one run into its folder: what it was, what came of it, what it cost, and how to repeat it."""

import re
import shlex
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fleetune.common import display
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.errors import UsageError
from fleetune.report import course, page, runlog
from fleetune.report.page import TableCell, esc, short_name, span, true_minus
from fleetune.report.runlog import (
    Number,
    RunLog,
    changed,
    flat,
    kind_of,
    list_of,
    map_of,
    measures,
    num_of,
    number,
    read,
    sum_of,
    text_of,
)
from fleetune.runs import rundir


def write(run: Path) -> Path:
    """Write `report.html` into the run folder and return the page's path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    log, target = read(run), run / "report.html"
    html = page.document(f"{log.name} - fleetune", "\n".join(filter(None, sections(log).values())))
    write_atomic(target, html.encode("utf-8", "replace"), mode=PRIVATE)  # it has held-out prompts
    return target


def drawing(run: Path) -> page.Drawing:
    """Return the validation loss by round, as a drawing that stands by itself; UsageError where there is nothing to draw."""
    measured = [step for step in runlog.steps(read(run)) if "loss" in step.losses]
    if len(measured) < 2:
        raise UsageError(f"{run} has fewer than two evaluated rounds to draw", hint="tune with eval_every=1")
    return page.drawing(course.losses(measured))


def sections(run: RunLog) -> dict[str, str]:
    """Return the report's sections as HTML, by name and in order; "" for one that has nothing to show."""
    steps, facts = runlog.steps(run), runlog.summarise(run)
    lost = (
        f"<footer>{display.counted(run.skipped, 'damaged line')} of metrics.jsonl left out.</footer>"
        if run.skipped
        else ""
    )
    return {
        "head": header(run, facts),
        "result": page.section("result", "Result", result(run, facts)),
        "course": page.section("course", "Training", course.course(run, steps, facts) + course.rates(run)),
        "fleet": page.section("fleet", "Fleet", course.fleet(run)),
        "samples": page.section("samples", "Samples", samples(run)),
        "configuration": page.section("configuration", "Configuration", configuration(run)),
        "versions": page.section("versions", "Versions", versions(run)),
        "again": page.section("again", "Run it again", _rerun_section(run)),
        "footer": lost,
        "sharing": sharing(run),
    }


def _rerun_section(run: RunLog) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if kind_of(run.status) not in {"done", "running"}:
        lines.insert(0, (run.resume, "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{esc(line)}</code></dt><dd>{esc(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'


def header(run: RunLog, facts: Mapping[str, object]) -> str:
    """Return title, state, the result in a sentence, and the run's settings."""
    kind = kind_of(run.status)
    mark = {"done": "✓", "running": "●", "failed": "✕", "interrupted": "❙❙"}.get(kind, "?")
    method, model = str(facts["method"] or "tuning"), str(facts["model"] or "an unnamed model")
    alert = ""
    if kind in {"failed", "interrupted"}:
        alert = f'<p class="alert">{esc(run.status)}. To go on: <code>{esc(run.resume)}</code></p>'
    if not run.intact:
        alert += f'<p class="alert">{esc(changed(run.name))}</p>'
    pill = f'<span class="pill {kind}">{mark} {esc(kind)}</span>'
    return (
        f'<header><p class="over">fleetune · {esc(run.name)} {pill}</p>'
        f"<h1>{esc(method)} <small>on</small> {esc(short_name(model))}</h1>"
        f'<p class="lead">{esc(_sentence(facts))}</p>{alert}{page.fact_list(_identity(run, facts))}</header>'
    )


def _sentence(facts: Mapping[str, object]) -> str:
    base, tuned = number(facts["base_loss"]), number(facts["tuned_loss"])
    rounds, moved, seconds = facts["rounds"], number(facts["bytes"]), number(facts["seconds"])
    spent = f" {display.human_bytes(moved)} were exchanged" if moved is not None else ""
    spent += f" in {display.human_time(seconds)}" if spent and seconds is not None else ""
    done = display.counted(rounds, "round")
    spent = _unbroken(spent)
    if base is None or tuned is None:
        return f"{done} so far; no loss to compare yet.{spent + '.' if spent else ''}"
    before, after = display.show("loss", base), display.show("loss", tuned)
    error = number(facts["change_error"])
    change = true_minus(display.change("loss", base, tuned, error))
    moves = f"{'fell' if tuned < base else 'rose'} from {before} to {after} ({change})"
    loss = f"stayed at {before}" if display.improved("loss", base, tuned) is None else moves
    if display.is_noise("loss", base, tuned, error):
        loss = f"went from {before} to {after} ({change}), which is within noise,"
    return f"Validation loss {loss} in {done}.{spent + '.' if spent else ''}"


def _unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=[a-zA-Z])", "\u00a0", text)


def _identity(run: RunLog, facts: Mapping[str, object]) -> list[tuple[str, str]]:
    digest, params = text_of("digest", run.start, run.env), num_of(run.start, "params")
    trained, dtype = num_of(run.start, "trained"), text_of("dtype", run.config, run.env)
    model = [f"{short_name(str(facts['model'] or ''))}{f' @ {digest[:12]}' if digest else ''}"]
    model += [f"{display.human_count(params)} params"] if params is not None else []
    model += [dtype] if dtype else []
    share = f"trains {display.human_count(trained)}" if trained is not None and trained != params else ""
    method = [str(facts["method"] or ""), _letters(run), share]
    sizes = [n for v in list_of(run.start, "rows_per_client") if (n := number(v)) is not None]
    clients, partition = facts["clients"], course.partition_words(run)
    data = [
        short_name(text_of("data", run.config)),
        display.counted(clients, "client") if clients is not None else "",
        partition,
    ]
    if sizes:
        middle = f", median {statistics.median(sizes):g}" if min(sizes) != max(sizes) else ""
        data.append(f"{span(sizes)} rows{' each' if len(sizes) > 1 else ''}{middle}")
    asked = [v for e in run.rounds if (v := num_of(e, "clients")) is not None]
    fleet = f" · {span(asked)} client{'' if max(asked) == 1 else 's'} in each" if asked else ""
    began = num_of(run.start, "t") or 0
    when = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC") if 0 < began < 1e11 else ""
    return [
        ("model", " · ".join(model)),
        ("method", " · ".join(part for part in method if part)),
        ("data", " · ".join(part for part in data if part)),
        ("rounds", f"{runlog.rounds_text(facts)}{fleet}"),
        ("seed", text_of("seed", run.config, run.start)),
        ("started", when),
    ]


def _letters(run: RunLog) -> str:
    """Return the method's settings; where the run states which are not defaults, only these and the learning rate."""
    shown = flat(map_of(run.config, "set"))
    if isinstance(run.start.get("changed"), list):
        named = {"lr", *(str(name).removeprefix("set.") for name in list_of(run.start, "changed"))}
        shown = [(k, v) for k, v in shown if k in named]
    return " · ".join(f"{k} {v}" for k, v in shown)


def versions(run: RunLog) -> str:
    """Return what env.json says: versions, the machine, digests."""
    told = page.fact_list(flat({k: v for k, v in run.env.items() if k != rundir.STARTED_IN}), "config")
    return page.folded("versions, machine and digests", told)


def result(run: RunLog, facts: Mapping[str, object]) -> str:
    """Return the measures before and after, then the run's cost."""
    base, tuned = measures(run)
    rows: list[list[str | TableCell]] = []
    for name in dict.fromkeys([*base, *tuned]):
        b, t = base.get(name), tuned.get(name)
        error = num_of(map_of(run.done, "change_errors"), name)
        kind, word = page.verdict(display.improved(name, b, t, error))
        word = "within noise" if display.is_noise(name, b, t, error) else word
        diff = TableCell(true_minus(display.change(name, b, t, error)) + (word and f", {word}"), kind)
        rows.append(
            [_label(run, name), TableCell(display.show(name, b)), TableCell(display.show(name, t)), diff]
        )
    row_count = num_of(run.final, "rows") or num_of(run.done, "rows")
    caption = f"Measured on {row_count:,} held-out rows" if row_count else "Measured on held-out rows"
    caption += f"; loss in {course.UNIT}" if "loss" in base or "loss" in tuned else ""
    measured = page.table(caption, ["", "base", "tuned", "change"], rows, "result") if rows else ""
    up, down = number(facts["bytes_up"]), number(facts["bytes_down"])
    asked, accepted = sum_of(run.rounds, "clients"), sum_of(run.rounds, "accepted")
    each = [display.human_bytes(_each(run, *pair)) for pair in (("bytes_up", up), ("bytes_down", down))]
    spent = [
        ("bytes over the fleet", display.human_bytes(number(facts["bytes"]))),
        ("sent by a client, per round", each[0]),
        ("received by a client, per round", each[1]),
        *_speed(run),
        ("wall time", display.human_time(number(facts["seconds"]))),
        ("peak memory", display.human_bytes(number(facts["peak_rss"]))),
        ("replies accepted", f"{accepted:,} of {asked:,}" if accepted is not None and asked else "-"),
    ]
    if not rows and not run.rounds:
        return "<p>Nothing has been measured yet.</p>"
    files = "".join(f"<li><code>{esc(name)}</code> {esc(size)}</li>" for name, size in _artefacts(run))
    digest = text_of("digest", run.done)
    files += f"<li>digest (SHA-256 of the tuned tensors) <code>{esc(digest)}</code></li>" if digest else ""
    told = "".join(f'<p class="alert">{esc(text)}</p>' for text in list_of(run.done, "remarks"))
    measured += told + (f'<ul class="files">{files}</ul>' if files else "")
    return f"{measured}<h3>Cost</h3>{page.fact_list(spent, 'config')}"


def _speed(run: RunLog) -> list[tuple[str, str]]:
    """Return steps and tokens per second of the clients' local work, where the run states them."""
    work = [e for e in run.clients if num_of(e, "steps") is not None and (num_of(e, "seconds") or 0) > 0]
    spent = sum(num_of(e, "seconds") or 0 for e in work)
    found = []
    for key, label in (("steps", "local steps per second"), ("tokens", "tokens trained on per second")):
        if spent and (total := sum_of(work, key)):
            found.append((label, f"{total / spent:,.0f}" if total > 20 * spent else f"{total / spent:.2g}"))
    return found


def _label(run: RunLog, name: str) -> str:
    """Return a measure's label; Rouge-L's with the number of its rows, which are fewer than the table's."""
    answered = num_of(run.done, "answered") if name == "rouge_l" else None
    return display.metric(name).label + (f", {answered:,} rows" if answered else "")


def _each(run: RunLog, key: str, total: Number | None) -> float | None:
    """Return a client's bytes in a round: the mean over those that moved any, else the total over those asked."""
    moved = [v for e in run.clients if (v := num_of(e, key))]
    if moved:
        return statistics.fmean(moved)
    asked = sum_of(run.rounds, "clients")
    return total / asked if total is not None and asked else None


def _artefacts(run: RunLog) -> list[tuple[str, str]]:
    """List results in the run folder, with their sizes."""
    out = []
    for name in ("ledger.safetensors", "adapter/adapter_model.safetensors"):
        path = run.path / name
        if path.is_file():
            out.append((name, display.human_bytes(path.stat().st_size)))
    return out


NOTE = (
    "This page shows the text of {} of the clients, with the model's answers. Share it only with those who may read them; "
    "a run with --no-samples has none."
)


def samples(run: RunLog) -> str:
    """Return the prompts with their answers."""
    listed = [s for s in list_of(run.final, "samples") if isinstance(s, dict)]
    return "".join(_sample(sample, i) for i, sample in enumerate(listed, 1))


def sharing(run: RunLog) -> str:
    """Return the note in the foot for who shares the page: how many held-out rows are on it; nothing for none."""
    count = len([s for s in list_of(run.final, "samples") if isinstance(s, dict)])
    return f"<footer>{esc(NOTE.format(display.counted(count, 'held-out row')))}</footer>" if count else ""


def _sample(sample: Mapping[str, object], number: int) -> str:
    owner = sample.get("client")
    title = f"Prompt {number}" + (f" · client {owner}" if owner not in (None, "") else "")
    parts = [
        f"<div><h4>{esc(label)}</h4><p>{_marked(sample.get(key) or '(nothing)')}</p></div>"
        for key, label in (("base", "before"), ("tuned", "after"), ("reference", "reference"))
        if sample.get(key) is not None
    ]
    prompt = _marked(sample.get("prompt") or "")
    return (
        f'<article class="sample"><h3>{esc(title)}</h3><p class="prompt">{prompt}</p>'
        f'<div class="answers">{"".join(parts)}</div></article>'
    )


def _marked(text: object) -> str:
    """Return a text with the bold, code and headings of its Markdown; lists read well as they are."""
    text = re.sub(r"(?m)^#{1,6} (.+)$", r"<strong>\1</strong>", esc(text))
    return re.sub(
        r"`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*",
        lambda m: f"<code>{m[1]}</code>" if m[1] else f"<strong>{m[2]}</strong>",
        text,
    )


PATHS = ("model", "data", "eval_data")  # options that may be paths: their last part is shown


def options(run: RunLog) -> list[tuple[str, str]]:
    """Return the options as text, without this machine's folders."""
    return [(k, short_name(v) if k in PATHS else v) for k, v in flat(run.config)]


def configuration(run: RunLog) -> str:
    """Return the options, those that differ from their defaults first where the run states which these are."""
    found = options(run)
    changed = {str(name) for name in list_of(run.start, "changed")}
    first = [(k, v) for k, v in found if k in changed]
    if not first:
        return page.fact_list(found, "config")
    rest = [(k, v) for k, v in found if k not in changed]
    return (
        f"<h3>Chosen for this run</h3>{page.fact_list(first, 'config chosen')}"
        f"{page.folded(f'{len(rest)} left at the default', page.fact_list(rest, 'config'))}"
    )
