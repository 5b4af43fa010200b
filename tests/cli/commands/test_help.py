"""`fleetune help`: every page, every section that a message names, and what leads nowhere."""

import ast
import re
from pathlib import Path

import pytest

import fleetune
from fleetune import errors
from fleetune.cli import main
from fleetune.cli.commands import help as pages
from fleetune.common.words import TOPICS
from fleetune.errors import UsageError

SOURCE = Path(fleetune.__file__).parent
KINDS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FleetuneError)]


def texts() -> list[str]:
    """Every text of the source that is no docstring."""
    found = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in said]
        found += [n.value for n in nodes if isinstance(n.value, str)]
    return [*found, *(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.toml"))]


def test_messages_name_topics_that_there_are():
    said, there = "\n".join(texts()), pages.found()
    named = set(re.findall(r"fleetune help ([a-z][\w#-]*(?:\.\w+)?)", said))
    assert {"data", "safety", "privacy", "models#tuning-on-from-an-adapter"} <= named
    sections = {kind.__new__(kind).page.removeprefix("fleetune help ") for kind in KINDS}
    assert "dataerror" in sections
    slugs = {name: {slug for _, _, slug in pages.headings(text)} for name, text in there.items()}
    for topic in named | sections | set(TOPICS.values()):
        page, _, slug = topic.partition("#")
        known = (slug in slugs[page]) if slug else page in there or any(page in s for s in slugs.values())
        assert known, topic
    assert not re.search(r"\bdocs/[\w-]+\.md", said)


def test_pages_are_listed_and_read(capsys):
    assert main.main(["help"]) == 0
    assert re.search(r"(?m)^ data +My data$", capsys.readouterr().out)
    assert main.main(["help", "to_a_phone"]) == 0
    assert capsys.readouterr().out.startswith("# From a tuned run to a phone\n")
    assert main.main(["help", "tune"]) == 0
    assert "--within" in capsys.readouterr().out
    assert main.main(["help", "DataError"]) == 0
    assert capsys.readouterr().out.startswith("## DataError\n")


def test_a_section_ends_where_the_next_begins_and_not_at_a_remark_in_code():
    text = "# Top\n\n## A b, c\n\n```sh\n# no heading\n```\n\n### Below\n\nx\n\n## D\n\ny\n"
    assert pages.section(text, "a-b-c") == text[7 : text.index("\n## D")]
    assert pages.section(text, "below") == "### Below\n\nx\n"
    assert pages.section(text, "d") == "## D\n\ny\n"
    assert pages.section(text, "no-heading") == ""


def test_what_the_site_draws_from_the_source_is_told_in_short(capsys):
    assert main.main(["help", "api"]) == 0
    out = capsys.readouterr().out
    assert ":::" not in out
    assert re.search(r"fleetune\.export\W+Write a model for a runtime, and read it back\.", out)


def test_links_are_topics():
    page = "[rows](data.md#the-forms), [it](../docs/to_a.md), [here](#x), [out](https://a.b/c.md) ![p](figures/p.svg)\n"
    assert pages.plain(page) == (
        "rows (`fleetune help data#the-forms`), it (`fleetune help to_a`), here, [out](https://a.b/c.md) ![p](figures/p.svg)\n"
    )


def test_what_leads_nowhere_is_said():
    with pytest.raises(UsageError, match="Did you mean 'data'"):
        pages.shown("dataa", pages.found())
