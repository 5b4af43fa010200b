"""What must stay equal while the code is made smaller: runs, artefacts, exported files, and what commands print.

`frozen.json` holds command lines by key, and what they gave.  It is changed only to record a difference that was meant:
`FREEZE=1 pytest tests/test_frozen.py` writes its values anew (with -k some of them).  In JSON and in the heads of other files,
what names a version or a format stands by itself.

All of it runs in one process of its own, on one thread, with torch and MKL held to instructions that every x86-64
processor has (`ANYWHERE`), so that most processors give the same last bits.  An entry states the processor that it was made
on, or "any" where integers alone decide; on a processor without a value of its own, a difference skips the test.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock

HERE = Path(__file__).parent
FROZEN = HERE / "frozen.json"
ANYWHERE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
ROWS = [
    {"instruction": f"Is the {shop} open on {day}?", "response": f"**{day}:** from {hour}.", "shop": shop}
    for shop, hour in [("bakery", 6), ("bookshop", 10), ("florist", 9)]
    for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
]
RECIPE = 'model = "tiny"\ndata = "rows.jsonl"\nmethod = "fedit"\npartition = "column:shop"\nrounds = 1\n[set]\nlr = 1e-3\n'

KEYS = [(part, key) for part, entries in json.loads(FROZEN.read_text("utf-8")).items() for key in entries]
SURVEY = "FedIT,FedPepTAO,FedPETuning,ZO-SGD,MeZO,FedKSeed,FedKSeed: Pro,one-byte,FwdLLM,GKD,LLM-Pruner,OPTQ,SparseGPT,case study"


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the code gives now for each key whose test was asked for; workers of one session do it once."""
    asked = [i.callspec.params for i in request.session.items if i.name.startswith("test_what_is_frozen[")]
    keys = [f"{params['section']} {params['key']}" for params in asked]
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "frozen.lock"):
        if not (folder / "frozen.json").exists():
            (folder / "frozen").mkdir()
            command = [sys.executable, __file__, str(folder / "frozen.json"), *keys]
            threads = {"OMP_NUM_THREADS": os.environ.get("FROZEN_THREADS", "1"), "NUMBA_NUM_THREADS": "1"}
            own = {"COLUMNS": "200", "FLEETUNE_HOME": str(folder / "frozen" / "cache")}
            env = os.environ | ANYWHERE | own | threads
            subprocess.run(command, cwd=folder / "frozen", env=env, check=True)
            shutil.rmtree(folder / "frozen")
    return json.loads((folder / "frozen.json").read_text(encoding="utf-8"))


def processor() -> str:
    """The processor's maker and instructions, and the version of torch: they may decide the last bits of a float."""
    import torch

    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    maker = (re.findall(r"vendor_id\s*: (\w+)", facts) or [sys.platform])[0]
    return f"{maker} {torch.backends.cpu.get_cpu_capability()}, torch {version('torch')}"


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_what_is_frozen(section, key, found):
    now, frozen = found[f"{section} {key}"], json.loads(FROZEN.read_text("utf-8"))
    values = frozen[section][key]["values"]
    assert not isinstance(now, str), now
    kind = "any" if section in ("laws", "files") else processor()
    if os.environ.get("FREEZE"):
        if kind in values:  # those of other processors are of before, too
            values.clear()
        values[kind] = now
        FROZEN.write_text(json.dumps(frozen, indent=1, ensure_ascii=False) + "\n", "utf-8")
    elif now not in values.values():
        if values and kind not in values:
            pytest.skip(f"no value is frozen for {kind}; it differs from that of {', '.join(values)}")
        assert now == values.get(kind), "a difference that was meant is recorded by FREEZE=1"


def test_each_row_of_the_survey_is_frozen():
    assert set(SURVEY.split(",")) <= {key for _, key in KEYS}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts; texts of JSON objects are taken apart too."""
    if isinstance(values, str) and values.startswith("{"):
        with contextlib.suppress(ValueError):
            values = json.loads(values)
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{name}.{key}".strip(".")).items()}


def split(values: Any) -> dict[str, Any]:
    """What names a version or a format, the digest of a method's settings, and that of all else but other packages."""
    every = {k: v for k, v in flat(values).items() if not re.search("(transformers|peft)_version$", k)}
    named = {k: v for k, v in every.items() if re.search("(version|format)$", k)}
    groups: dict[str, Any] = {}
    for k in every.keys() - named.keys():
        groups.setdefault("settings" if ".hyper." in k else "rest", {})[k] = every[k]
    return named | {n: sha(json.dumps(g, sort_keys=True, default=str).encode()) for n, g in groups.items()}


def parts(file: Path) -> dict[str, Any]:
    """The digests of a file and of its parts."""
    data, found = file.read_bytes(), {}
    if file.suffix == ".json":
        return split(json.loads(data))
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:end])
        found = split(head.pop("__metadata__", {}))
        found["tensors"] = sha(json.dumps(head, sort_keys=True).encode() + data[end:])
    if file.suffix == ".gguf":
        import gguf

        reader = gguf.GGUFReader(file)
        found = split({name: field.contents() for name, field in reader.fields.items()})
        each = reader.tensors
        tensors = [(t.name, t.tensor_type.name, t.shape.tolist(), sha(t.data.tobytes())) for t in each]
        found["tensors"] = sha(json.dumps(tensors).encode())
    return found | {"bytes": sha(data)}


KEPT = re.compile(
    r"\.(safetensors|gguf|patch)$|^Modelfile$|^(config|adapter_config|quantize_config|module)\.json$"
)
MASKS = {
    r"(?<![-\w])(\d+h)?\d+m\d*s?\b|(?<![-\w])[\d.]+ (ms|s|minutes?|seconds|h)\b": "TIME",
    r"(memory\W+(about |TIME\W+)?|TIME +)[\d.,]+ [kMG]?B": r"\1MEMORY",
    r"\d{4}-\d\d-\d\d[T ][\d:.]+Z?": "DATE",
    r"(fingerprint) [0-9a-f]{64}": r"\1 OF A KEY",
    r" +": " ",
    r"([-─])\1+": r"\1",
}


def said(line: str) -> list[Any]:
    """The exit code of a command line, and the lines that it writes to stdout, but for what differs from run to run."""
    from fleetune.cli.main import main

    words = shlex.split(line)
    env = dict([words.pop(0).split("=")]) if "=" in words[0] else {}
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, env):
        try:
            code = main([*words, "--offline"])
        except SystemExit as end:
            code = int(end.code or 0)
    text = out.getvalue().replace(str(Path.cwd()), "HERE")
    for mask, word in MASKS.items() if "--json" not in line else ():
        text = re.sub(mask, word, text)
    return [code, *(line.strip() for line in text.splitlines() if line.strip())]


def law(name: str, lines: list[str]) -> dict[str, Any]:
    """What a ledger of fixed steps along directions of a law makes of the tiny model."""
    from fleetune import models
    from fleetune.seeds.ledger import Ledger, LedgerHead

    model = models.load("tiny", device="cpu")
    tensors = tuple((n, tuple(t.shape), "float32") for n, t in models.named_tensors(model.net))
    K = 64 if name == "hashed" else 1
    head = LedgerHead(model.digest, model.tokenizer_digest, tensors, 0x0123456789ABCDEF, name, K, 2.0**-18)
    ids, steps = np.array([0, 3, 5, 63], np.uint64), np.array([5, -300, 70_000, 1])
    Ledger(head).append(ids, steps, 1).save(file := Path("law.safetensors"))
    return {line: said(line) for line in lines} | {file.name: parts(file)}


def record(section: str, key: str, lines: list[str]) -> dict[str, Any]:
    """What is to be frozen of some command lines; the current folder holds the models and rows."""
    if section == "laws":
        return law(key, lines)
    if section == "pages":
        return {line: said(line) for line in lines}
    before = set(Path().rglob("*"))
    answers = [said(f"{line} --json") for line in lines]
    done = json.loads(answers[-1][-1])
    kept = {k: done[k] for k in ("event", "digest", "base", "tuned", "bytes_up", "bytes_down") if k in done}
    place = Path("out" if section == "files" else "")
    made = [p for p in place.rglob("*") if p not in before and p.is_file()]
    files = {p.as_posix(): parts(p) for p in sorted(made) if KEPT.search(p.name) and "latest" not in p.parts}
    return {"exits": [code for code, *_ in answers], **kept, **files}


def record_all(file: Path, keys: list[str]) -> None:
    sys.path.insert(0, str(HERE / "deploy"))
    from deploy_harness import tiny

    from fleetune import models
    from fleetune.models.cache import cache

    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    made = {"tiny": tiny(), "other": tiny(seed=1), "wide": tiny(**wide)}
    for name, model in made.items():
        models.save(model.net, model.tokenizer, Path("given") / name)
    models.save(made["tiny"].net, made["tiny"].tokenizer, cache.hub_target(cache.SMOLLM2_135M.hub))
    Path("given/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("given/recipe.toml").write_text(RECIPE, encoding="utf-8")
    found: dict[str, Any] = {}
    root, frozen = Path.cwd(), json.loads(FROZEN.read_text("utf-8"))
    for section, key in [(s, k) for s, k in KEYS if not keys or f"{s} {k}" in keys]:
        gc.freeze()  # else each run looks through all that was imported
        shutil.copytree(root / "given", root / "at")
        os.chdir(root / "at")
        try:
            answer: Any = record(section, key, frozen[section][key]["commands"])
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        found[f"{section} {key}"] = answer
        os.chdir(root)
        shutil.rmtree(root / "at")
        print(f"{time.process_time():.1f} s of processor time after {section} {key}", file=sys.stderr)
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    record_all(Path(sys.argv[1]), sys.argv[2:])
