"""Bring two pages from outside docs/ into the site, and make it need no network.  mkdocs calls these functions."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
# Generated pages are not committed: a committed page links to the source, and the site to the page that is made from it.
MADE = {
    "src/fleetune/cli/commands": "commands.md",
    "src/fleetune/tuning/recipe/recipe.py": "recipe.md",
    "src/fleetune/common/events.py": "events.md",
    "docs/faults.json": "faults.md",
}
METHODS = {"src/fleetune/tuning/methods": "methods", "src/fleetune/compression/methods": "compress"}

SHIM = "https://unpkg.com/iframe-worker/shim"  # what Material loads for the search of pages opened from disk
OURS = "assets/iframe-worker.js"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages under their names in the site."""
    from mkdocs.structure.files import File

    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=moved(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ to the pages that were brought in."""
    return markdown if page.file.src_uri in PAGES.values() else moved(markdown, f"docs/{page.file.src_uri}")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load the search's helper from the site itself."""
    return output.replace(SHIM, posixpath.relpath(OURS, posixpath.dirname(page.file.dest_uri) or "."))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The same for pages without a source, such as 404.html."""
    return output.replace(SHIM, OURS)


def moved(text: str, source: str) -> str:
    """The page at `source` with its relative links as they must be in the site, where docs/ is the root.

    A link to a file that the site does not have becomes plain text.
    """
    where = PAGES.get(source, source.removeprefix("docs/"))

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = path.startswith("docs/") and not (ROOT / path).is_dir()
        page = PAGES.get(path) or made_from(path) or (path.removeprefix("docs/") if inside else "")
        if not page:
            return words
        return f"[{words}]({posixpath.relpath(page, posixpath.dirname(where) or '.')}{anchor})"

    code = re.compile(r"(^```.*?^```|^    [^\n]*\n)", re.S | re.M)  # stays as it is
    parts = code.split(text)
    parts[::2] = [re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)", link, part) for part in parts[::2]]
    return "".join(parts)


def made_from(path: str) -> str:
    """The generated page of a source file, "" for none."""
    folder, name = posixpath.split(path)
    if folder in METHODS and name.endswith(".py") and not name.startswith("_"):
        return f"{METHODS[folder]}/{name.removesuffix('.py').replace('_', '-')}.md"
    return MADE.get(path, "")
