"""Find which columns of a data set are which: as they are mapped, else by their names, else by the length of their texts."""

import itertools
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NoReturn

from fleetune.common.display import quoted
from fleetune.data import forms
from fleetune.data.forms import CLIENT, COLUMNS_HINT, EXAMPLE, FIELDS, MAIN, OPTIONAL, SYSTEM
from fleetune.data.readers import names_of
from fleetune.errors import DataError, RecipeError, closest, suggest

Fields = Mapping[str, object]
WORDS: Final = (  # what a question and its answer are called, in most languages that have such files
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("q", "a"),
    ("frage", "antwort"),
    ("question", "réponse"),
    ("pregunta", "respuesta"),
    ("domanda", "risposta"),
    ("pergunta", "resposta"),
    ("vraag", "antwoord"),
    ("fråga", "svar"),
    ("spørgsmål", "svar"),
    ("spørsmål", "svar"),
    ("kysymys", "vastaus"),
    ("pytanie", "odpowiedź"),
    ("otázka", "odpověď"),
    ("soru", "cevap"),
    ("вопрос", "ответ"),
    ("питання", "відповідь"),
    ("سؤال", "جواب"),
    ("问题", "回答"),
    ("问题", "答案"),
    ("質問", "回答"),
    ("질문", "답변"),
)
# what has words, and is neither a question nor an answer
OTHERS: Final = (
    "client",
    "system",
    "context",
    "category",
    "source",
    "title",
    "titel",
    "titre",
    "name",
    "url",
    "date",
    "datum",
)
INSIDE: Final = 4  # letters of a word that is looked for inside longer ones, as in Kundenfrage
SPACELESS: Final = "\u2e80"  # from here on: Chinese, Japanese
SEEN: Final = 200  # columns at most that are looked at


def parse(spec: str | Mapping[str, str]) -> dict[str, str]:
    r"""Return name -> column of a mapping or a list `NAME=COLUMN,..`; {} for "".  A comma of a column may be written `\,`.

    COLUMN=NAME is understood, too.  RecipeError for what is none, and for unknown names.
    """
    found: dict[str, str] = {}
    spec = spec if isinstance(spec, str) else spec_of(spec)
    for part in _parts(spec):
        name, equals, column = (piece.strip().replace("\\,", ",") for piece in part.partition("="))
        if name not in FIELDS and column in FIELDS:
            name, column = column, name
        why = ""
        if not (name and equals and column):
            why = f"{part.strip()!r} is not NAME=COLUMN"
        elif name not in FIELDS:
            why = f"no form has a field {name!r}." + suggest(name, FIELDS)
        elif name in found:
            why = f"{name!r} is named twice"
        elif name != SYSTEM and sentence({SYSTEM: column}) is not None:
            why = f"{name} is a column, no text: only system may be one"
        elif name != CLIENT and column in [c for n, c in found.items() if n != CLIENT]:
            why = f"column {column!r} is named twice"
        if why:
            raise RecipeError(
                [f"columns = {spec!r}: {why}"],
                hint=f"such as --columns {EXAMPLE}; the names: {', '.join(MAIN)}",
            )
        found[name] = column
    return found


def _parts(spec: str) -> list[str]:
    """Split a list at its commas; what follows one without a NAME= belongs to the column before it."""
    parts: list[str] = []
    for piece in spec.replace("\\,", "\0").split(",") if spec else []:
        if "=" in piece or not parts:
            parts.append(piece)
        else:
            parts[-1] += "\0" + piece
    return [part.replace("\0", "\\,") for part in parts]


def spec_of(mapped: Mapping[str, str]) -> str:
    """Return the list that `parse` reads as this mapping."""
    return ",".join(f"{name}={column}".replace(",", "\\,") for name, column in mapped.items())


def sentence(spec: str | Mapping[str, str]) -> str | None:
    """Return the system's turn of rows that have none, which a mapping states as system='TEXT'; None where it states none."""
    text = (parse(spec) if isinstance(spec, str) else spec).get(SYSTEM, "")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else None


def renamed(fields: Fields, mapped: Mapping[str, str]) -> dict[str, object]:
    """Return a row with the mapped columns under the names of the form; a column that had such a name is hidden."""
    moved = {column for name, column in mapped.items() if name != CLIENT}
    rest = {name: value for name, value in fields.items() if name not in moved and name not in mapped}
    return rest | {name: fields[column] for name, column in mapped.items() if column in fields}


def settled(given: Mapping[str, str], rows: Sequence[Fields], source: str) -> tuple[dict[str, str], str]:
    """Return the mapping with what is missing in it, guessed from the first rows, and what to say of it; "" for nothing.

    DataError where a column that is mapped is in none of the rows, or nothing can be guessed.
    """
    if not rows:
        return dict(given), ""
    if sentence(given) is not None:
        found, assumed = settled({n: c for n, c in given.items() if n != SYSTEM}, rows, source)
        return found | {SYSTEM: given[SYSTEM]}, assumed
    names = dict.fromkeys(name for fields in rows for name in itertools.islice(fields, SEEN))
    there = [name for name in names if str(name).strip()]
    mapped = {name: _in_any_case(column, rows, there) for name, column in given.items()}
    lacking = [n for n, column in mapped.items() if n not in OPTIONAL and not _is_in(column, rows)]
    if lacking:
        said = [f"{mapped[name]!r} to read as {name}" for name in lacking]
        near = [
            f"{like!r}" for name in lacking if (like := closest(mapped[name], map(str, there), cutoff=0.5))
        ]
        raise DataError(
            f"{source} has no column {', and none '.join(said)} (there are: {names_of(dict.fromkeys(there))})",
            hint=f"did you mean {' and '.join(near)}?" if near else f"such as --columns {EXAMPLE}",
        )
    try:
        known = any(forms.form_of(renamed(fields, mapped), mapped) for fields in rows)
    except forms.BadRow:  # two forms in one row, which is told with its place
        known = True
    if known:
        return mapped, ""
    found = mapped | _guessed(mapped, rows, [name for name in there if name not in mapped.values()])
    if not any(form_under(found, fields) for fields in rows):
        _refuse(mapped, rows, there, source)
    return found, f"columns assumed: --columns {quoted(spec_of(found))}"


def _is_in(column: str, rows: Sequence[Fields]) -> bool:
    return any(column in fields for fields in rows)


def _in_any_case(column: str, rows: Sequence[Fields], there: Collection[str]) -> str:
    """Return the column as the rows write it, where one of them differs in its case alone."""
    alike = [] if _is_in(column, rows) else [name for name in there if _plain(name) == _plain(column)]
    return alike[0] if len(alike) == 1 else column


def form_under(mapped: Mapping[str, str], fields: Fields, wanted: Collection[str] | None = None) -> str:
    """Return the form of a row under a mapping, all of which (or what is `wanted`) it has; "" where none fits, or two do."""
    try:
        return forms.form_of(renamed(fields, mapped), mapped if wanted is None else wanted)
    except forms.BadRow:
        return ""


def _plain(name: str) -> str:
    """Return a name without case, accents and what is around it."""
    letters = unicodedata.normalize("NFKD", str(name)[:100].strip().casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _guessed(mapped: Mapping[str, str], rows: Sequence[Fields], there: Sequence[str]) -> dict[str, str]:
    """Return name -> column for what the mapping lacks: the fields of a form in another case, a chat, a question, an answer."""
    for fields in rows:
        cased = {_plain(name): name for name in fields if name in there and _plain(name) in FIELDS}
        if form := form_under({**cased, **mapped}, fields, mapped):
            return {
                name: cased[name] for name in forms.fields_of(form) if name in cased and name not in mapped
            }
    for name in there:
        if any(_is_chat(fields.get(name)) for fields in rows):
            return {"messages": name}
    pairs = [texts for texts, _ in forms.LABELLED.values() if len(texts) == 2]
    return {} if any(set(texts) <= set(there) for texts in pairs) else _pair(mapped, rows, there)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & value[0].keys())
    )


def _pair(mapped: Mapping[str, str], rows: Sequence[Fields], there: Sequence[str]) -> dict[str, str]:
    """Return the columns of question and answer: by both their names, by one that holds sentences, by the longest of these."""
    named = {_plain(name): name for name in there if any(isinstance(f.get(name), str) for f in rows)}
    wanted = [name for name in ("prompt", "response") if name not in mapped]
    for words in WORDS if len(wanted) == 2 else ():
        if all(_plain(word) in named for word in words):
            return dict(zip(wanted, (named[_plain(word)] for word in words), strict=True))
    free = [name for name in there if not set(_pieces(_plain(name))) & set(OTHERS)]
    long = {name: size for name in free if (size := _length_of_text(name, rows))}
    found: dict[str, str] = {}
    for name in wanted:
        likes = {c: _likeness(_plain(c), name) for c in long if c not in found.values()}
        best = max(likes, key=lambda c: (likes[c], long[c]), default="")
        found |= {name: best} if likes.get(best) else {}
    lacking = [name for name in wanted if name not in found]
    left = sorted(long.keys() - set(found.values()), key=lambda c: (-long[c], c))[: len(lacking)]
    return found | dict(zip(lacking, sorted(left, key=there.index), strict=False))


def _likeness(name: str, role: str) -> int:
    """Return how surely a column's name says a role: 2 by a word of its own, 1 by one inside it, 0 not at all."""
    words = {_plain(pair[role == "response"]) for pair in WORDS}
    if {word for word in words if len(word) > 1} & set(_pieces(name)):
        return 2
    return int(any((len(word) >= INSIDE or word >= SPACELESS) and word in name for word in words))


def _pieces(name: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in name).split()


def _length_of_text(name: str, rows: Sequence[Fields]) -> float:
    """Return the mean length of a column's values; 0 where they are no sentences (numbers, codes, single words), or all one."""
    values = [value for fields in rows if isinstance(value := fields.get(name), str) and value.strip()]
    sentences = sum(_is_sentence(value[:1000]) for value in values)
    same = len(values) > 2 and len(set(values)) == 1
    return sum(map(len, values)) / len(values) if 2 * sentences > len(values) and not same else 0.0


def _is_sentence(value: str) -> bool:
    words = sum(len(word) > 1 and not any(map(str.isdigit, word)) for word in value.split())
    return words > 1 or sum(letter >= SPACELESS for letter in value) > 3


def _refuse(mapped: Mapping[str, str], rows: Sequence[Fields], there: Sequence[str], source: str) -> NoReturn:
    """Raise for rows in which no form is found, with the mapping that may be meant."""
    long = {name: size for name in there if (size := _length_of_text(name, rows))}
    held = f" with {', '.join(mapped)}" if mapped else "" if long else ", and none holds sentences"
    hint = COLUMNS_HINT
    if any(all(text in rows[0] for text in texts) for texts, _ in forms.LABELLED.values()):
        hint = f"give each row a label, in the field 'label'; or {hint}"
    elif long and not mapped:
        text = {"text": max(long, key=lambda name: long[name])}
        hint += f"; to train on texts alone: --columns {quoted(spec_of(text))}"
    raise DataError(
        f"{source} has the columns of no form{held} (there are: {names_of(dict.fromkeys(there))})", hint=hint
    )
