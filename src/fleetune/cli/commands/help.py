"""`fleetune help [TOPIC]`: the pages of the documentation, which a wheel holds, one section of them, or a file to deploy."""

import argparse
import ast
import re
from pathlib import Path
from typing import Final

import fleetune
from fleetune.cli.console import Ui
from fleetune.common.display import quoted
from fleetune.common.words import TOPICS
from fleetune.errors import UsageError, suggest

HELP = "read the documentation: a page, a section, or a command"
ORDER = 150
EXAMPLES = """\
fleetune help                    the pages
fleetune help data               one of them; fleetune help data | less
fleetune help dataerror          the section with this heading
fleetune help fleetune-device.service   a file to deploy, as fleetune-server.service and Dockerfile
"""
PLACES = (Path(fleetune.__file__).parent / "docs", Path(fleetune.__file__).parents[2] / "docs")
MADE = "<!-- made by"  # pages that only the site has
DEPLOY: Final = ("fleetune-device.service", "fleetune-server.service", "Dockerfile")  # printed as they are


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "topic", metavar="TOPIC", nargs="?", help="a page, a heading, PAGE#HEADING, or a command"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List the pages, or show what a topic names."""
    pages = found()
    if not args.topic:
        ui.table(["topic", "page"], [[name, text.partition("\n")[0][2:]] for name, text in pages.items()])
        ui.paths([("next", "fleetune help TOPIC, or fleetune COMMAND --help")])
    elif args.topic in DEPLOY:
        ui.text(pages[args.topic.lower()])
    else:
        ui.document(plain(shown(args.topic, pages)))


def found() -> dict[str, str]:
    """Return the text of every page by the name of its topic."""
    place = next((p for p in PLACES if (p / "troubleshooting.md").is_file()), None)
    if place is None:
        raise UsageError("the documentation is not installed", hint="fleetune COMMAND --help")
    files = [*sorted(place.glob("*.md")), *sorted(place.glob("tutorials/*.md"))]
    texts = {path.stem.replace("_", "-"): path.read_text(encoding="utf-8") for path in files}
    texts |= {name.lower(): (place.parent / "deploy" / name).read_text(encoding="utf-8") for name in DEPLOY}
    return {name: text for name, text in texts.items() if name != "index" and not text.startswith(MADE)}


def shown(asked: str, pages: dict[str, str]) -> str:
    """Return the text of a topic: a page's, a section's, or a command's help; UsageError for none."""
    page, _, heading = asked.lower().replace("_", "-").replace(" ", "-").partition("#")
    page = TOPICS.get(page, page)
    if page in pages and not heading:
        return pages[page]
    for name, text in pages.items():
        if (not heading or page == name) and (part := section(text, heading or page)):
            return part
    from fleetune.cli.main import command_parsers

    if (command := command_parsers().get(page)) is not None:
        return command.format_help()
    raise UsageError(
        f"no page or heading is called {quoted(asked)}.{suggest(page, pages)}", hint="fleetune help"
    )


def headings(text: str) -> list[tuple[int, int, str]]:
    """Return (depth, place, anchor) of every heading of a page."""
    code = [m.span() for m in re.finditer(r"(?ms)^```.*?^```", text)]
    return [
        (len(m[1]), m.start(), re.sub(r"[^\w -]", "", m[2]).strip().lower().replace(" ", "-"))
        for m in re.finditer(r"(?m)^(#+) (.*)$", text)
        if not any(a <= m.start() < b for a, b in code)
    ]


def _from_source(directive: re.Match[str]) -> str:
    """Return the names that a directive of the site stands for, each with the first line of its docstring."""
    module, members = directive[1], re.findall(r"\w+", directive[2].partition("members:")[2])
    if not members:
        module, _, name = module.rpartition(".")
        members = [name]
    file = Path(fleetune.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    nodes = {
        n.name: n
        for n in ast.parse(file.read_text("utf-8")).body
        if isinstance(n, ast.ClassDef | ast.FunctionDef)
    }
    docs = {name: (ast.get_docstring(nodes[name]) or "").partition("\n")[0] for name in members}
    return "".join(f"- `{'fleetune.' * (n in fleetune.__all__)}{n}`: {doc}\n" for n, doc in docs.items())


def section(text: str, slug: str) -> str:
    """Return the section of a page whose heading has this anchor, with what is below it; "" for none."""
    heads = headings(text)
    for i, (depth, start, name) in enumerate(heads):
        if name == slug:
            end = next((at for d, at, _ in heads[i + 1 :] if d <= depth), len(text))
            return text[start:end].rstrip() + "\n"
    return ""


def plain(text: str) -> str:
    """Return a page with its links as the topics they lead to, what the site draws from the source in short, and no remarks."""
    text = re.sub(r"(?s)<!--.*?-->\n?", "", text)
    text = re.sub(r"(?m)^::: ([\w.]+)\n((?: .*\n?)*)(?:\n(?=:::))?", _from_source, text)
    text = re.sub(
        r"(?<!!)\[([^\]]+)\]\((?:[\w./-]*/)?([\w-]+)\.md(#[\w-]+)?\)", r"\1 (`fleetune help \2\3`)", text
    )
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:)[^)\s]*\)", r"\1", text)
