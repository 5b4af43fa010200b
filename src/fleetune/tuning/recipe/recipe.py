"""The recipe of a run: every option once, with its type, default and help.

Flags, keys of a TOML file, `run.toml` and the table in the docs are made from these fields.

A YAML file of axolotl, LLaMA-Factory or mlx-lm is read as a recipe, too.  They tune in one place: its rows are those of one
client, whose rounds are passes, unless `clients` says otherwise.
"""

import dataclasses
import importlib
import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from fleetune.common import settings, words
from fleetune.common.display import quoted
from fleetune.common.settings import Value
from fleetune.data import columns, sources
from fleetune.data.partition import RowsSpec, held_out_problem
from fleetune.data.read_rows import is_folder, looks_like_model, looks_like_rows, settled_columns
from fleetune.errors import RecipeError, UsageError, suggest
from fleetune.models.cache.names import hub_of

log = logging.getLogger(__name__)

CHOICES: Final = re.compile(r"\^\(([\w|]+)\)\$")
AUTO_METHOD: Final = "auto"  # the method of a recipe that names none
SHOWN: Final = 80  # characters of a refused value
WORDS: Final = {
    "Input should be": "must be",
    "Value error, ": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def problem_text(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as "rounds = 0: must be at least 1"."""
    name = ".".join(str(part) for part in error["loc"])
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return f"{name} is missing"
    shown = _shown(value)
    if kind == "string_pattern_mismatch" and (found := CHOICES.fullmatch(error["ctx"]["pattern"])):
        known = found[1].split("|")
        return f"{name} = {shown}: none of {', '.join(known)}.{suggest(str(value), known)}"
    text = str(error["msg"])
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    return f"{name} = {shown}: {text}" if name else text


def _shown(value: object) -> str:
    """Return a value as it was written: a number from the command line is a text, and is not put in quotes."""
    number = isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE)
    text = str(value) if number else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}.."


def in_our_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with keys of other tools as ours, and settings of a method among the settings."""
    names, found, chosen = fields(), dict[str, Any](), dict[str, Any]()
    for key, value in values.items():
        word = words.RECIPE.get(key, "") if key not in names else key if key == "method" else ""
        if not word and key not in names and importlib.import_module("fleetune.tuning.methods").having([key]):
            word = f"set.{key}"
        said = words.meaning(word, value, each_round="rounds" in values) if word else {key: value}
        chosen |= {name[4:]: one for name, one in said.items() if name.startswith("set.")}
        found |= {name: one for name, one in said.items() if not name.startswith("set.")}
    if isinstance(own := found.get("set", {}), Mapping):
        ours = {name: word[4:] for name in own if (word := words.RECIPE.get(name, "")).startswith("set.")}
        found["set"] = chosen | {ours.get(name, name): value for name, value in own.items()}
    return found


def no_method_problems(chosen: Sequence[str]) -> list[str]:
    """Say which of these settings no method has, with suggestions; or that no method has all of them."""
    methods = importlib.import_module("fleetune.tuning.methods")
    if odd := [name for name in chosen if not methods.having([name])]:
        every = sorted({s.name for method in methods.entries() for s in methods.settings(method)})
        return [f"no method has a setting '{name}'.{suggest(name, every, cutoff=0.5)}" for name in odd]
    return [f"no method has all of the settings {', '.join(chosen)}"]


def scales_problems(
    method: str, chosen: Mapping[str, Any], base: str, device: str, able: Sequence[str]
) -> tuple[list[str], str]:
    """Say what of a recipe cannot train the scales of a quantised base, and what to change; [] and "" where all can.

    `chosen` are the method's settings, `able` the methods that can.
    """
    train = "train = scales"
    found: list[tuple[str, str]] = []
    if method not in able:
        found.append(
            (f"{train} is for {', '.join(able)}, not for {method}", f"--method {able[0]}, or --train weights")
        )
    elif (module := chosen.get("module", "scales")) != "scales":
        found.append((f"{train} is the module scales, not {module}", "--set module=scales"))
    if base == "memory":
        found.append((f"{train} reads the base from its GGUF file, base = memory does not", "--base mapped"))
    if device not in ("auto", "cpu"):
        found.append((f"{train} runs on the CPU, not on device = {device}", "--device cpu"))
    if chosen.get("law") == "gaussian":
        found.append(
            (f"{train} takes integer sums of directions, which law = gaussian has not", "--set law=hashed")
        )
    return [problem for problem, _ in found], "; ".join(change for _, change in found)


def check_order(model: str, rows: str) -> None:
    """Raise UsageError where the model is the data, and the data are the model."""
    if looks_like_rows(model) and (os.path.isfile(model) or hub_of(rows) or looks_like_model(rows)):
        raise UsageError(
            f"MODEL and DATA are swapped: {model} holds rows"
            + (f", {rows} is a model" * looks_like_model(rows)),
            hint=f"fleetune tune {quoted(rows)} {quoted(model)}",
        )


MOVE_BLOCKS: Final = ("mezo", "fedkseed", "onebyte")  # can move a quantised base's scales along directions
SCALES_EPS: Final = 0.01  # their perturbation of scales, unless given: ten steps of fp16
SCALES_MODULE: Final = "fedpetuning"  # trains scales by back-propagation, as its module `scales`
SCALE_METHODS: Final = (*MOVE_BLOCKS, SCALES_MODULE)
MOST_ROWS: Final = 1 << 53  # far beyond any data; what counts rows takes such a number
MOST_THREADS: Final = 4096  # torch and Numba fail on what is far beyond a machine's


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """All that decides a run.  The same recipe on the same machine gives the same bits."""

    model: str = Field(
        description="hub id, HF directory, GGUF file, or a built-in name (fleetune models); with train = scales also a "
        "compressed model, whose GGUF file is written first"
    )
    data: str = Field(
        description="file of rows (JSONL, CSV, Excel, text, ..), a folder with one per client, hub id, - (JSONL from standard "
        "input), or 'demo' for the built-in set"
    )
    method: str = Field(
        default=AUTO_METHOD,
        description="tuning method (fleetune methods); auto: the one that plan recommends for this machine and model",
    )
    set: dict[str, Value] = Field(default_factory=dict, description="the method's own settings, NAME=VALUE")
    clients: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="number of clients (0: the method's own, usually 8; if --within is short, one; with column:, one per value)",
    )
    rounds: int = Field(default=10, ge=1, le=1_000_000, description="rounds")
    within: str = Field(
        default="",
        description="shrink the run to take at most this long on this machine, such as 30m: fewer evaluations, "
        "answers, local steps, rounds, clients",
    )
    participation: float = Field(default=1.0, gt=0, le=1, description="share of the clients asked each round")
    columns: str = Field(
        default="",
        description="map your columns: prompt=question,response=answer; names: prompt, response, system (or 'TEXT', for all), "
        "context, text, label, messages, client, or any field of a form (fleetune help data); default: by their names, else "
        "the two with the longest texts, and a note says which",
    )
    strict: bool = Field(
        default=False,
        description="refuse data with any bad row, such as one with an empty cell (default: a tenth of the rows may be left out)",
    )
    dedupe: bool = Field(
        default=False, description="leave out training rows that equal an earlier one, or one of eval_data"
    )
    train_turns: str = Field(
        default="last",
        pattern="^(last|all)$",
        description="which answers of a conversation are trained on; all: each as a row (of a device's rows: fleet join)",
    )
    partition: str = Field(
        default="auto",
        description="iid, dirichlet:ALPHA:COLUMN or column:COLUMN; auto: column:client for a folder with one "
        "file per client, or where columns name the client, else iid",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="rows kept for validation: a share (below 1) or a number",
    )
    eval_data: str = Field(
        default="", description="validate on these rows instead of held-out ones (file, hub id)"
    )
    labels: str = Field(
        default="",
        description="label words, comma-separated (a comma in a word: \\,): what an encoder chooses among (default: the data's "
        "answers), and what a causal model's accuracy is measured by (default: not)",
    )
    limit: int = Field(
        default=0,
        ge=0,
        le=MOST_ROWS,
        description="use only the first N rows (0: all); of a folder the first of each client, evenly",
    )
    max_length: int = Field(
        default=512,
        ge=8,
        description="most tokens per row; the prompt is shortened first (to no less than a quarter), then the end of the answer",
    )
    seed: int = Field(default=42, ge=0, lt=1 << 63, description="seed of everything random in the run")
    dtype: str = Field(
        default="fp32", pattern="^(fp32|bf16|fp16)$", description="type of the weights: fp32, bf16 or fp16"
    )
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda|mps)$", description="auto, cpu, cuda or mps")
    base: str = Field(
        default="auto",
        pattern="^(auto|memory|mapped)$",
        description="where the base's weights are: memory, or mapped, in their file (GGUF or safetensors; on the CPU), from "
        "which pieces are read; auto: mapped where the weights would take half of the memory.  The result is the same",
    )
    ram: str = Field(
        default="",
        description="memory that the work may take, such as 2GB (default: what this machine, or the container or unit "
        "that it runs in, allows)",
    )
    train: str = Field(
        default="weights",
        pattern="^(weights|scales)$",
        description="scales: tune the scales of a quantised GGUF file's blocks, whose codes stay (fedpetuning, mezo, fedkseed, "
        "onebyte); the result is that file with other scales, and nothing is rounded afterwards; weights: what the method tunes",
    )
    kinds: str = Field(
        default="",
        description="kinds of the clients in turn, as 0,1,1, where the method has several (default: by the method's "
        "share); a real device falls back to another kind if its memory is short",
    )
    drop: float = Field(
        default=0.0, ge=0, lt=1, description="simulate: chance that a client drops out of a round"
    )
    stragglers: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="simulate: share of clients that are 2 to 10 times slower (needs deadline or over_selection)",
    )
    deadline: float = Field(
        default=0.0,
        ge=0,
        description="simulate: leave out clients that take more than this many times the usual time (0: wait)",
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="ask this many times the clients that participation says; the round ends when that share has replied",
    )
    quorum: int = Field(default=1, ge=1, description="fewer good replies than this leave the model as it was")
    aggregation: str = Field(
        default="mean",
        description="how replies become one: mean[:TIMES], weighted by rows (at most TIMES the median's), or against "
        "liars: median, trimmed-mean[:SHARE], norm-clip, sign-vote; fleet serve chooses unless given (fleetune help safety)",
    )
    privacy: str = Field(
        default="none",
        pattern="^(none|client|example|sealed)$",
        description="client: differential privacy that hides whether any one client took part; example: any one row of a "
        "client; sealed: the server sees sums of replies alone; epsilon then hides any one reply, too (fleetune help privacy)",
    )
    epsilon: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="privacy budget; the noise follows from it and the rounds",
    )
    delta: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="chance that epsilon does not hold (0: a tenth of 1 / clients, or rows)",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="noise multiplier: deviation of the noise over clip_norm (0: from epsilon)",
    )
    clip_norm: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="largest L2 norm of a client's reply, or of a row's gradient (0: found on held-out rows)",
    )
    max_rows: int = Field(
        default=0, ge=0, le=MOST_ROWS, description="most rows that a client counts for (0: any number)"
    )
    keep_replies: bool = Field(
        default=False,
        description="store the replies that each round counts, so that a client can be left out later (fleetune help ledger)",
    )
    eval_every: int = Field(
        default=1, ge=0, description="validation loss every N rounds (0: before and after only)"
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="stop after this many evaluated rounds in a row without a new best, and keep the best unless told "
        "otherwise (0: run all)",
    )
    keep: str = Field(
        default="last",
        pattern="^(last|best)$",
        description="the model that is the result: of the last round, or of the best evaluated one (the start counts)",
    )
    eval_rows: int = Field(default=200, ge=1, description="held-out rows for the validation loss")
    rouge_rows: int = Field(
        default=0, ge=0, description="held-out prompts answered for Rouge-L before and after (0: none)"
    )
    samples: int = Field(
        default=4,
        ge=0,
        description="held-out prompts answered before and after; their text is kept in the run's report (0: no text is kept)",
    )
    client_rows: int = Field(
        default=4,
        ge=0,
        le=MOST_ROWS,
        description="simulate: rows of each client that its loss is measured on before and after (0: none; up to 4, fewer "
        "in a short run, and none of more than 64 clients)",
    )
    answer_tokens: int = Field(default=96, ge=1, description="most tokens per generated answer")
    threads: int = Field(default=0, ge=0, le=MOST_THREADS, description="processor threads (0: all)")

    @field_validator("columns", mode="before")
    @classmethod
    def _columns(cls, given: object) -> object:
        return columns.spec_of(given) if isinstance(given, Mapping) else given

    @field_validator("held_out")
    @classmethod
    def _held_out(cls, number: float) -> float:
        if why := held_out_problem(number):
            raise ValueError(why)
        return number


def fields() -> dict[str, tuple[Any, Any, str]]:
    """name -> (type, default, help) of every option, in order; a required one's default is `dataclasses.MISSING`."""
    declared: dict[str, FieldInfo] = Recipe.__pydantic_fields__  # type: ignore[attr-defined]
    found = {}
    for name, info in declared.items():
        default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
        found[name] = (info.annotation, default, info.description or "")
    return found


def choices(name: str) -> list[str]:
    """Return the values that an option allows; an empty list where it is free."""
    info: FieldInfo = Recipe.__pydantic_fields__[name]  # type: ignore[attr-defined]
    patterns = [p for part in info.metadata if (p := getattr(part, "pattern", None))]
    found = CHOICES.fullmatch(patterns[0]) if patterns else None
    return found[1].split("|") if found else []


def make(values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values; RecipeError lists every problem, with suggestions for unknown keys."""
    names, values = list(fields()), in_our_words(values)
    problems = [f"unknown option '{key}'.{suggest(key, names)}" for key in values if key not in names]
    try:
        recipe = TypeAdapter(Recipe).validate_python({k: v for k, v in values.items() if k in names})
    except ValidationError as error:
        problems += [problem_text(dict(e)) for e in error.errors()]
    problems += [
        f"{name} = {text!r} is not text in UTF-8, and a run writes it down"
        for name, text in _unwritable(values)
    ]
    if problems:
        raise RecipeError(problems, hint="all options: fleetune tune --help")
    if recipe.patience and "keep" not in values:
        recipe = dataclasses.replace(recipe, keep="best")
    return resolved(recipe)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the partition that `auto` means for its data, and what training scales means for its method.

    Of a folder with the splits of one data set, the training file is the data, and the validation file what is measured on.
    The partition stays as it is where the data's columns cannot be read.
    """
    if is_folder(recipe.data) and (split := sources.splits(recipe.data)):
        recipe = dataclasses.replace(recipe, data=split[0], eval_data=recipe.eval_data or split[1])
    if (recipe.method, recipe.train, recipe.set.get("module")) == (SCALES_MODULE, "weights", "scales"):
        recipe = dataclasses.replace(recipe, train="scales")
    recipe = dataclasses.replace(recipe, set={**own_settings(recipe.train, recipe.method), **recipe.set})
    try:
        return dataclasses.replace(recipe, partition=rows_of(recipe).rule)
    except RecipeError:  # told when the recipe is checked, with all else
        return recipe


def own_settings(train: str, method: str) -> dict[str, Value]:
    """Return the settings that a method has by itself where it trains `train`: weights or scales."""
    if train == "scales" and method in MOVE_BLOCKS:
        return {"eps": SCALES_EPS}
    return {"module": "scales"} if train == "scales" and method == SCALES_MODULE else {}


def trained(recipe: Recipe) -> str:
    """Return what a recipe trains (`train`); where no method is named yet, the module `scales` says it too."""
    return "scales" if recipe.set.get("module") == "scales" else recipe.train


def rows_of(recipe: Recipe) -> RowsSpec:
    """The options of a recipe that decide which client holds which rows."""
    return RowsSpec(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(RowsSpec)})


def with_columns(recipe: Recipe, note: Callable[[str], None], *, offline: bool = False) -> Recipe:
    """Return the recipe with its columns as the first rows of its data have them, which are read before any model is."""
    check_order(recipe.model, recipe.data)
    try:
        columns.parse(recipe.columns)
    except RecipeError:  # told with all else that is wrong
        return recipe
    if recipe.data == sources.STDIN:  # read once, later
        return recipe
    found = settled_columns(recipe.data, recipe.columns, note, offline=offline)
    return dataclasses.replace(recipe, columns=found)


def _unwritable(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the values that no file in UTF-8 can hold, as a file's name may be."""
    settings = values.get("set")
    named = {**values, **({f"set.{k}": v for k, v in settings.items()} if isinstance(settings, dict) else {})}
    texts = ((n, v) for n, v in named.items() if isinstance(v, str))
    return [(n, v) for n, v in texts if v.encode(errors="ignore").decode() != v]


def label_words(text: str) -> tuple[str, ...]:
    """The label words of the option `labels`."""
    return tuple(settings.given_words(text))


def read(path: Path, note: Callable[[str], None] = log.info) -> dict[str, Any]:
    """The keys of a TOML recipe, or of another tool's YAML (`note` is told what became of them); RecipeError for neither."""
    if path.suffix.lower() in YAML:
        values, told = read_yaml(path, fields())
        for text in told:
            note(text)
        return values
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except RecursionError as error:
        raise RecipeError([f"{path} is nested too deep"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            [f"{path} is not TOML: {error}"], hint="strings need quotes; numbers do not"
        ) from error
    except OSError as error:
        there = not isinstance(error, FileNotFoundError)
        said = f"cannot read {path}: {error.strerror}" if there else f"no recipe at {path}"
        raise RecipeError([said], hint="give a TOML file, or a run folder's run.toml") from error


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value resolved, each with its help as a comment; `read` gives it back."""
    lines = ["# A Fleetune recipe. Run it again: fleetune tune -c run.toml", ""]
    table = []
    for name, (_, _, text) in fields().items():
        value = getattr(recipe, name)
        if isinstance(value, dict):
            pairs = (f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items())
            table = ["", f"[{name}]  # {text}", *pairs]
        else:
            lines.append(f"{name} = {toml_value(value)}  # {text}")
    return "\n".join(lines + table) + "\n"


def toml_key(name: str) -> str:
    """A key as TOML writes it."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_value(value: Value) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


YAML: Final = (".yml", ".yaml")  # of axolotl, LLaMA-Factory or mlx-lm
OF_OTHERS: Final = {"method": "fedit", "clients": 1}
SO_ANYWAY: Final = (  # is so here too, or changes no weight
    "train test do_train model_type tokenizer_type processor_type type template sample_packing packing pad_to_sequence_len "
    "flash_attention attn_implementation logging_steps save_steps save_strategy save_every steps_per_report steps_per_eval "
    "plot_loss overwrite_output_dir overwrite_cache strict group_by_length mask_prompt preprocessing_num_workers "
    "dataloader_num_workers dataset_prepared_path dataset_dir save_only_model val_batches test_batches "
    "per_device_eval_batch_size eval_batch_size"
)


def read_yaml(path: Path, names: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's values and what to say of them; `names` are the options of a recipe.

    RecipeError for a file that is no YAML, or holds no keys.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    except OSError as error:
        raise RecipeError([f"no recipe at {path} ({error.strerror})"]) from error
    if not isinstance(found, dict):
        raise RecipeError([f"{path} holds no keys"], hint="a recipe in TOML, or the YAML of another tool")
    theirs = _flat({str(key): value for key, value in found.items()})
    values: dict[str, Any] = dict(OF_OTHERS)
    chosen, left = dict[str, Any](), dict[str, Any]()
    for key, value in theirs.items():
        if value is False or value in ("sft", None, "", "auto", [], {}) or key in SO_ANYWAY.split():
            continue
        said = _said(key, value, names)
        if not said:
            left[key] = value
        chosen |= {name[4:]: one for name, one in said.items() if name.startswith("set.")}
        values |= {name: one for name, one in said.items() if not name.startswith("set.")}
    values["set"] = chosen
    return values, _told_of_yaml(path, values, left)


def _said(key: str, value: Any, names: Mapping[str, object]) -> dict[str, Any]:
    """Return what a key says in our words; {} where it has no place."""
    word = key if key in names else words.RECIPE.get(key, "")
    if isinstance(value, list):
        value = ",".join(map(str, value)) if all(isinstance(one, str) for one in value) else None
    if not word or value is None or isinstance(value, dict):
        return {}
    if value is True and word.startswith("set."):
        value = "true"
    try:
        said = words.meaning(word, math.ceil(float(value)) if word == "epochs" else value)
    except ValueError:
        return {}
    known = all(name in names or name.startswith("set.") for name in said)
    odd = word == "method" and str(value).lower() not in words.VALUES["method"] and key != "method"
    return said if known and not odd else {}


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """Return the keys without tables in them, the batch as one number, and the data as a name."""
    lora = found.pop("lora_parameters", None)
    if isinstance(lora, dict):  # mlx-lm: `scale` is alpha / r
        rank, scale = lora.pop("rank", None), lora.pop("scale", None)
        found |= {f"lora_{key}": value for key, value in lora.items() if isinstance(key, str)}
        if isinstance(rank, int):
            found["lora_rank"] = rank
            found |= {"lora_alpha": round(scale * rank)} if isinstance(scale, int | float) else {}
    every = found.get("gradient_accumulation_steps")
    for key in ("micro_batch_size", "per_device_train_batch_size", "batch_size"):
        if isinstance(every, int) and isinstance(size := found.get(key), int):
            found[key] = size * found.pop("gradient_accumulation_steps", 1)
    sets = found.get("datasets")
    if isinstance(sets, list) and len(sets) == 1 and isinstance(sets[0], dict) and "path" in sets[0]:
        files = sets[0].get("data_files")
        found["datasets"] = files if isinstance(files, str) else sets[0]["path"]
    listed, name = Path(str(found.get("dataset_dir") or "data"), "dataset_info.json"), found.get("dataset")
    if isinstance(name, str) and listed.is_file():  # LLaMA-Factory: a name in its list
        with suppress(ValueError, KeyError, TypeError):
            found["dataset"] = str(listed.parent / json.loads(listed.read_text("utf-8"))[name]["file_name"])
    return found


def _told_of_yaml(path: Path, values: Mapping[str, Any], left: Mapping[str, Any]) -> list[str]:
    pairs = [f"{key} = {value}" for key, value in values.items() if key != "set"]
    pairs += [f"set.{key} = {value}" for key, value in values["set"].items()]
    told = [f"{path} is read as: {', '.join(pairs)}"]
    if left:
        shown = [f"{k} = {v}" if isinstance(v, str | int | float) else k for k, v in left.items()]
        told.append(f"has no place here: {', '.join(shown)}")
    if values.get("base") == "mapped":
        told.append(words.REMARKS["base=mapped"])
    return told
