"""The pipeline as functions: plan, tune, sweep, evaluate, compress, export, measure, serve, chat; `open` looks a name up.

A model may be a name, a path, the number of a run or compression, `latest`, or a result of `tune` or `compress`; `plan`, `tune`
and `sweep` start from a plain model.  With `offline` the network is never used; `out` is the folder of the runs.

A function that takes long prints lines where a person reads them (a terminal or a notebook); `progress=True` prints in a pipe
too.  A `listener` gets events, remarks and progress instead (`runs/listener.py`).  Other remarks go to the log `fleetune`.
"""

import re

from fleetune.errors import FleetuneError

NAMES = {n: n for n in ("plan", "tune", "sweep", "compress", "export", "measure")}
NAMES |= {"eval": "evaluate", "runs": "list_runs"}
LISTED = {"methods": ("methods", "tuning"), "compress": ("compressors", "compression")}
RESUMED = {"tune": "resume_run", "sweep": "resume_sweep", "compress": "resume_compression"}
_WORD = r"(?:'[^']*'|[^\s'();,]+(?:,[^\s'();,]+)*(?<!:))"
_NO_VALUE = r"--|(?:or|and|is|of|out|with|cuts|takes|gives?)\b"
_OPTION = rf"--set ([\w.]+)=({_WORD})|(?<![\w/-])--(?!from\b)([a-z][a-z-]+)(?: (?!{_NO_VALUE})({_WORD}))?"
_TOLD = re.compile(rf"(?:fleetune|llama-[a-z-]+|pip) ([a-z-]+)((?: (?!and\b|or\b){_WORD})*)|{_OPTION}")


def in_python(hint: str) -> str:
    """Return a hint or a remark with calls in place of commands and arguments in place of options, where Python has them."""
    return re.sub(r"\},? settings=\{", ", ", _TOLD.sub(_call, hint))  # settings together


def _call(found: re.Match[str]) -> str:
    verb, words, *option = found.groups()
    if words is None:
        return _argument(*option)
    if verb == "methods" or words.startswith(" --list"):
        listing, layer = LISTED[verb]
        of = words.removeprefix(" --list").strip().replace("-", "_")
        return f"help('fleetune.{layer}.methods.{of}')" if of else f"fleetune.{listing}()"
    name = (RESUMED if words.startswith(" --resume ") else NAMES).get(verb)
    if name is None or re.search(r" (-c|list|rm)\b", words):
        return found[0]
    if words == " --help":
        return f"help(fleetune.{'Recipe' if name == 'tune' else name})"
    said = words.removeprefix(" --resume")
    given: list[str] = []
    for part in re.finditer(f"{_OPTION}|({_WORD})", said):
        if part[5] and given and "=" in given[-1]:  # a word after options: the sentence goes on
            return f"fleetune.{name}({', '.join(given)}){said[part.start() - 1 :]}"
        given.append(_argument(*part.groups()))
    return f"fleetune.{name}({', '.join(given)})"


def _argument(setting: str, of: str, option: str, value: str, word: str | None = "") -> str:
    """Return an option as an argument, or a word; `word` is None for an option of a call, which is true without a value."""
    if setting:
        return f"settings={{{setting!r}: {_value(of)}}}"
    if option == "vary":
        return "vary={'NAME': [VALUE, VALUE]}"
    name = "settings" if option == "set" else (option or "").replace("-", "_")
    return _value(word) if word else f"{name}={_value(value)}" if value else name + "=True" * (word is None)


def _value(word: str) -> str:
    """Return a shell's word as Python has it; numbers, and what stands for a value (FILE, ..), as they are."""
    return word if re.fullmatch(r"[\d.]+(e-?\d+)?|[A-Z]+|\.\.", word) else repr(word.strip("'"))


FleetuneError.spoken = in_python
