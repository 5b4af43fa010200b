# SPDX-License-Identifier: Apache-2.0
"""Name the pip command that adds an extra to this installation.

A Fleetune that came from a folder or a file is not to be had by its name: pip states where it came from in the file
`direct_url.json` of an installed package (PEP 610), and the command names that place.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fleetune.common.shell import quoted


@cache
def pip_install(extra: str = "") -> str:
    """Return the command that installs Fleetune with an extra (none for ""), from where this Fleetune came from."""
    wanted = f"[{extra}]" if extra else ""
    origin = _origin()
    url, editable = str(origin.get("url", "")), bool(origin.get("dir_info", {}).get("editable"))
    if "dir_info" in origin:
        place = url2pathname(urlsplit(url).path)
        return f"pip install {'-e ' if editable else ''}{quoted(place + wanted)}"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info'].get('vcs', 'git')}+{url}"
    return f"pip install '{'fleetune' + wanted}{' @ ' + url if url else ''}'"


def _origin() -> dict[str, dict[str, object]]:
    """Return what pip noted of the origin; {} for a package from an index, and where nothing can be read."""
    try:
        text = metadata.distribution("fleetune").read_text("direct_url.json")
        found = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
