"""Every line that a command prints with `--json` is one of the events of the JSON schema that docs/build.py writes; none is left out."""

import contextlib
import functools
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator as Validator

from fleetune import models
from fleetune.cli import main as cli
from fleetune.common import events
from fleetune.deploy import harness

SCHEMA = json.loads(runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build.py"))["events_schema"]())
VALIDATORS = {name: Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{name}"}]}) for name in SCHEMA["$defs"]}
NAMES = [cls.__name__ for cls in events.classes()]
FEW = "--clients 2 --rounds 1 --limit 40 --held-out 8 --max-length 128 --samples 0 --threads 1 --device cpu"
ZEROTH = "--method fedkseed --set K=16 --set tau=2 --set batch_size=1"
GROUP = "--set group=8"
WINDOWS = "--windows 2 --length 16"
GKD = "--method gkd --set teacher=same --set keep_layers=2 --set steps=2 --set batch_size=1 --set lmbda=0"
PRUNE = "--method llm-pruner --set ratio=0.5 --set recover=none --set first=0 --set last=0"

# In order; numbers are those of the runs that the commands before have made.
TOUR = {
    "plan tiny --ram 4GB --uplink 1Mbps": {"PlanRow", "PlanSettings"},
    "plan tiny --ram 10MB": {"PlanRow", "Failed"},
    "methods": {"MethodListed"},
    "methods mezo": {"SettingListed"},
    "models": {"ModelListed", "ModelCached"},
    "models rm mine.gguf": {"ModelRemoved"},
    "recipes": {"RecipeListed"},
    "recipes mezo": {"RecipeListed"},
    f"tune tiny demo {ZEROTH} --set lr=1e-3 {FEW} --dry-run": {"TuneChecked"},
    f"tune tiny demo {ZEROTH} {FEW}": {"TuneStart", "ClientReply", "RoundDone", "RoundEvaluated", "TuneDone"},
    f"tune tiny demo --method fedit --set r=2 {FEW} --partition dirichlet:1:category": {"TuneDone"},
    "tune --resume 1": {"TuneDone"},
    "tune tiny nowhere.jsonl": {"Failed"},
    "eval 1 --tasks loss,rouge,f1,em,perplexity --limit 2 --answer-tokens 2 --device cpu": {"EvalDone"},
    "ledger show 1": {"LedgerShown"},
    "ledger replay 1": {"DigestFound"},
    "verify 1": {"LinkVerified", "Verified"},
    "release 1": {"Released"},
    "ledger compact 1 --to small.safetensors": {"LedgerWritten"},
    "ledger scale 1 --factor 2 --to double.safetensors": {"LedgerWritten"},
    "ledger diff 1 double.safetensors": {"LedgerDifference"},
    "sweep sweep.toml --dry-run": {"SweepPlanned"},
    "sweep sweep.toml": {"SweepStart", "TuneStart", "SweepRun", "SweepDone"},
    "data check rows.jsonl --held-out 2": {"DataChecked"},
    "data check rows.jsonl --model tiny --max-length 32": {"DataChecked"},
    "compress --list": {"MethodListed"},
    f"compress 1 --dry-run {GROUP} {WINDOWS}": {"CompressChecked"},
    f"compress 1 {GROUP} {WINDOWS}": {"CompressStart", "BlockSolved", "CompressDone"},
    f"compress 1 --calibrate clients {GROUP} {WINDOWS}": {"CalibrationReply", "CompressDone"},
    f"compress tiny --data rows.jsonl {GKD}": {"CompressStart", "StepDone", "CompressDone"},
    f"compress tiny --data rows.jsonl {PRUNE}": {"ModelPruned", "CompressDone"},
    "compress --resume 4": {"CompressDone"},
    "export 4 --to hf --text text.txt": {"ExportDone", "ExportChecked"},
    "export 2 --to gguf:lora": {"ExportDone"},
    "measure 4 --text text.txt --length 16 --windows 1 --limit 2 --prompt-tokens 4 --new-tokens 2 --repeats 1": {
        "Measured",
        "MeasureDone",
    },
    "runs": {"RunListed", "SweepListed", "CompressionListed"},
    "runs show 1 4": {"RunListed", "CompressionListed"},
    "runs rm 6 7": {"RunRemoved"},
}
# these need an engine, a tokenizer with merges, the network, devices, Ctrl-C or a run that diverges: their tests check the lines
ELSEWHERE = (
    "Answered BudgetMeasured BudgetSpent DeviceEvaluated Diverging FleetEvaluated FleetShown "
    "ModelPulled PatchApplied PatchMade Serving Stopped"
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each command of the tour prints."""
    at = tmp_path_factory.mktemp("tour")
    models.tiny_llama(layers=4).save(at / "tiny")
    rows = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (at / "text.txt").write_text("a plain text of some words. " * 20, encoding="utf-8")
    keys = 'model = "tiny"\ndata = "rows.jsonl"\nmethod = "fedkseed"\nrounds = 1\nclients = 2\nsamples = 0\n'
    table = "[set]\ntau = 2\nbatch_size = 1\nlr = 1e-3\n[sweep]\nK = [4, 8]\n"
    (at / "sweep.toml").write_text(f'{keys}held_out = 2\ndevice = "cpu"\n{table}', encoding="utf-8")
    (cached := at / "home" / "models" / "gguf-0123").mkdir(parents=True)
    (cached / "config.json").write_text("{}", encoding="utf-8")
    (cached / "fleetune_source.json").write_text('{"source": "file mine.gguf", "file": "mine.gguf"}')
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        patch.setenv("FLEETUNE_HOME", str(at / "home"))
        patch.setenv("XDG_CONFIG_HOME", str(at / "config"))
        patch.setattr(harness, "measured", harness.carry_out)  # here, and not in a process for each figure
        for command in TOUR:
            found[command] = _printed(command, patch)
    return found


def _printed(command: str, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*command.split(), "--json", "--offline", "-q"])
    return [json.loads(line) for line in out.getvalue().splitlines()]


def _kinds(line: dict[str, Any]) -> set[str]:
    """The events that a line is."""
    return _kinds_of(json.dumps(line))


@functools.cache
def _kinds_of(text: str) -> set[str]:
    line = json.loads(text)
    return {name for name in NAMES if VALIDATORS[name].is_valid(line)}


@pytest.mark.parametrize("command", TOUR)
def test_every_line_is_an_event(command: str, lines: dict[str, list[dict[str, Any]]]) -> None:
    assert lines[command]
    for line in lines[command]:
        assert list(line)[:2] == ["v", "event"]
        assert _kinds(line), line
    seen = set().union(*(_kinds(line) for line in lines[command]))
    assert seen >= TOUR[command]
    assert "Failed" in TOUR[command] or "Failed" not in seen, lines[command][-1]


def test_every_event_is_seen(lines: dict[str, list[dict[str, Any]]]) -> None:
    seen = {kind for printed in lines.values() for line in printed for kind in _kinds(line)}
    assert set(NAMES) - seen == set(ELSEWHERE.split())


def test_a_line_with_another_field_is_not_valid(lines: dict[str, list[dict[str, Any]]]) -> None:
    line = lines["verify 1"][-1]
    whole = Validator(SCHEMA)
    assert whole.is_valid(line)
    assert not whole.is_valid({**line, "another": 1})
    assert not whole.is_valid({k: v for k, v in line.items() if k != "subject"})
    assert not whole.is_valid({**line, "proven": "two"})
