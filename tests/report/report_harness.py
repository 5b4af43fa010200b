"""A run folder as a real run leaves it, and a reader of its page."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

from fleetune.report import single

CATEGORIES = (
    *("brainstorming", "classification", "closed_qa", "creative_writing", "general_qa"),
    *("information_extraction", "open_qa", "summarization"),
)
PARAMS = 134_515_008
REASONS = {
    "refused": "array 'lora_A.3' is not finite",
    "dropped": "client dropped out (simulated)",
    "late": "slower than 3 times a usual client",
    "ok": "",
}


def fake_run(
    parent: Path,
    name: str = "0007-fedit-smollm2-135m",
    *,
    clients: int = 24,
    rounds: int = 10,
    asked: int = 24,
    status: str = "done",
    categories: Sequence[str] = CATEGORIES,
) -> Path:
    r, run, method = random.Random(3), parent / name, name.split("-")[1]
    (run / "adapter").mkdir(parents=True)
    counts = {c: [1 + round(12 * r.gammavariate(0.5, 1.0)) for _ in range(clients)] for c in categories}
    rows = [sum(each) for each in zip(*counts.values(), strict=True)]
    start = {"event": "start", "method": method, "model": "smollm2-135m", "digest": "9f2c" * 16}
    start |= {"params": PARAMS, "trained": 4_884_480, "clients": clients, "rounds": rounds}
    start |= {"partition": "dirichlet:0.5:category", "column": "category"}
    start |= {"rows_per_client": rows, "counts": counts}
    base, tuned = {"loss": 2.3914, "rouge_l": 11.82}, {"loss": 2.3914, "rouge_l": 11.82}
    events: list[dict[str, object]] = [start, {"event": "eval", "round": 0, **base}]
    up = down = peak = 0
    for n in range(1, rounds + 1):
        event = {"event": "round", "round": n, "clients": asked, "seconds": 0.0}
        event |= dict.fromkeys(("accepted", "bytes_up", "bytes_down"), 0)
        for client in sorted(r.sample(range(clients), asked)):
            kind = r.choices(list(REASONS), [1, 3, 2, 94])[0]
            rss, took = 1_180_000_000 + n * 3_000_000 + r.randrange(40_000_000), round(r.uniform(2.2, 4.4), 3)
            sent, received = 2_457_600 * (kind in ("ok", "refused")), 2_458_112
            loss = round(float(tuned["loss"]) + r.gauss(0.02, 0.19), 4) if kind == "ok" else None
            reply = {"event": "client", "round": n, "client": client, "n": rows[client], "loss": loss}
            reply |= {"bytes_up": sent, "bytes_down": received, "seconds": took, "rss": rss}
            events.append(reply | {"status": kind, "reason": REASONS[kind]})
            peak = max(peak, rss)
            event["accepted"] += kind == "ok"
            event["bytes_up"] += sent
            event["bytes_down"] += received
            event["seconds"] = round(event["seconds"] + took, 3)
        up, down = up + event["bytes_up"], down + event["bytes_down"]
        events.append(event | {"bytes_total": up + down, "rss": rss})
        loss, rouge = 0.78 * tuned["loss"] + 0.22 * 1.86, 0.8 * tuned["rouge_l"] + 0.2 * 24.9
        tuned = {"loss": round(loss, 4), "rouge_l": round(rouge, 2)}
        events.append({"event": "eval", "round": n, **tuned})
    if status == "done":
        done = {"event": "done", "base": base, "tuned": tuned, "bytes_up": up, "bytes_down": down}
        events.append(
            done | {"wall": 731.5, "peak_rss": peak + 12_000_000, "rows": 240, "digest": "51ab" * 16}
        )
        final = {"base": base, "tuned": tuned, "rows": 240, "samples": SAMPLES}
        (run / "eval.json").write_text(json.dumps(final))
    write_lines(run, [{"v": 1, "t": 1_760_000_000.0 + i, **event} for i, event in enumerate(events)])
    (run / "status").write_text(status + "\n")
    part = asked / clients
    (run / "run.toml").write_text(RECIPE.format(method=method, clients=clients, rounds=rounds, part=part))
    env = {"fleetune": "0.1.0", "python": "3.11.7", "torch": "2.9.0", "processors": 2, "digest": "9f2c" * 16}
    (run / "env.json").write_text(json.dumps(env))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 2_460_000)
    return run


RECIPE = """# A Fleetune recipe. Run it again: fleetune tune -c run.toml

model = "smollm2-135m"  # hub id, HF directory, GGUF file, or a built-in name
data = "demo"
method = "{method}"
clients = {clients}
rounds = {rounds}
participation = {part}
partition = "dirichlet:0.5:category"
held_out = 0.1
eval_data = ""
limit = 0
max_length = 512
seed = 42
dtype = "fp32"

[set]  # the method's own settings
r = 8
alpha = 16
lr = 0.0003
targets = "all-linear"
exact = false
"""

SAMPLES = [
    {"prompt": "Sort: glue.", "reference": "drill", "base": "Sure!", "tuned": "Tools: x.", "client": 5},
    {"prompt": "It reads 9 °C.", "reference": "a", "base": "It is\na room", "tuned": "c", "client": 6},
    {"prompt": "One line.", "reference": "North gate", "base": "The north", "tuned": "Closed", "client": 7},
]

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Balance, ids, texts, attributes and tables of a page; fails on the first wrong closing tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = list[str](), list[str](), list[str]()
        self.attributes, self.tables = list[tuple[str, str, str]](), list[list[list[str]]]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.tables[-1][-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    @property
    def text(self) -> str:
        return "".join(self.words)

    def table(self, *head: str) -> list[list[str]]:
        (found,) = [t for t in self.tables if tuple(t[0][: len(head)]) == head]
        return found[1:]


def page_of(run: Path) -> Page:
    path = single.write(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def lines_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def restated(run: Path, of: str = "start", **more: object) -> Path:
    return write_lines(run, [line | more if line["event"] == of else line for line in lines_of(run)])


def self_contained(page: Page, text: str) -> None:
    """Nothing in it is fetched and nothing runs."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"href", "src", "xlink:href", "srcset", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text
