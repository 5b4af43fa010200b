"""Run every method on a tiny model of every family: what was trained must be what is loaded again and exported.

A cell is a whole run of one round (`fleetune.tune`), then

    ledger        the logits of the run's model (base and ledger, through the view) against those of the exported Hugging
                  Face directory in transformers: equal bit for bit
    LoRA          our model with its adapter against PEFT's, from the run's directory: the same
    prefix, prompt  likewise, within 1e-4 (PEFT's attention adds up in another order)
    bitfit, full  the model with its parameters against the directory of `export --to hf`: the same
    the others    the model loaded again gives the held-out loss that the run had, within 1e-6

and in each the model must have moved.  A solver or pruner must end.  A cell is `ok`, the first line of an error of ours
(what such a model cannot have), or a fault: anything else.
"""

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fleetune
from command_line import FEW
from fleetune import models
from fleetune.errors import FleetuneError
from fleetune.tuning.result.finished import TuneResult
from tiny_families import DECODERS, ENCODERS

ROWS: Final = 12
TWO_POINT: Final = {"lr": 1e-3, "eps": 1e-3, "batch_size": 2}
POOL: Final = {**TWO_POINT, "K": 16, "tau": 4}
STEPS: Final = {"batch_size": 4, "lr": 1e-2}
MODULE: Final = {**STEPS, "epochs": 1}
FORWARD: Final = {"lr": 0.1, "batch_size": 4, "P": 2, "patience": 1}


class Fault(Exception):
    """A run whose result is not what was trained."""


class Column(NamedTuple):
    """A method with its settings; `peer` is what its result is held against: hf, peft, or itself loaded again."""

    method: str
    settings: dict[str, Any]
    peer: str


COLUMNS: Final[dict[str, Column]] = {
    "fedkseed": Column("fedkseed", POOL, "hf"),
    "fedkseed, backprop": Column("fedkseed", {**POOL, "backprop": 1.0, "backprop_lr": 0.01}, "hf"),
    "onebyte": Column("onebyte", {**TWO_POINT, "lr": 0.05, "K": 16, "directions": 4}, "hf"),
    "mezo": Column("mezo", POOL, "hf"),
    "zosgd": Column("zosgd", POOL, "hf"),
    "fedit": Column("fedit", {**MODULE, "r": 2, "dropout": 0.0}, "peft"),
    "lora": Column("fedpetuning", {**MODULE, "size": 2}, "peft"),
    "adapter": Column("fedpetuning", {**MODULE, "size": 4, "module": "adapter"}, "again"),
    "prefix": Column("fedpetuning", {**MODULE, "size": 4, "module": "prefix"}, "peft"),
    "prompt": Column("fedpetuning", {**MODULE, "size": 4, "module": "prompt"}, "peft"),
    "bitfit": Column("fedpetuning", {**MODULE, "module": "bitfit"}, "hf"),
    "full": Column("fedpetuning", {**MODULE, "module": "full"}, "hf"),
    "fwdllm": Column("fwdllm", FORWARD, "peft"),
    "fwdllm, adapter": Column("fwdllm", {**FORWARD, "module": "adapter"}, "again"),
    "fwdllm, bitfit": Column("fwdllm", {**FORWARD, "module": "bitfit"}, "hf"),
    "fedpeptao": Column("fedpeptao", {**STEPS, "epochs": 1, "tokens": 2, "layers_rule": "all"}, "again"),
}
SOLVERS: Final[dict[str, dict[str, Any]]] = {
    "rtn": {"group": 8},
    "optq": {"group": 8},
    "qronos": {"group": 8},
    "sparsegpt": {},
    "llm-pruner": {"first": 0, "last": 0, "ratio": 0.5, "round_to": 8, "recover": "none"},
}
NAMES: Final = [*COLUMNS, *SOLVERS]
FAMILIES: Final = [*DECODERS, *ENCODERS]
LOST: Final = re.compile(r"^every client failed.*?: (\w+Error: .*)$", re.MULTILINE)


def tune(model: Path, column: Column, out: Path) -> TuneResult:
    """Run one round over two clients."""
    words = ("no", "yes") if model.name in ENCODERS else ("up and down", "left and right")
    rows = [{"instruction": f"say {i}", "output": words[i % 2]} for i in range(ROWS)]
    of = {"method": column.method, "settings": column.settings}
    return fleetune.tune(model, rows, out=out, max_length=64, **of, **FEW)


def check(result: TuneResult, model: Path, peer: str) -> None:
    """Raise Fault unless the result moved, and is what was trained."""
    tuned, base = result.model(), models.load(str(model))
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    ours = logits(tuned.net.requires_grad_(False), ids)  # torch chooses kernels by it
    if torch.equal(ours, logits(base.net, ids)):
        raise Fault("nothing moved")
    if peer == "again" or not (peer == "hf" or (result.path / "adapter_config.json").is_file()):
        again = fleetune.evaluate(result, tasks=["loss"], device="cpu")["loss"]
        if not abs(again - result.done.tuned["loss"]) < 1e-6:  # summed up in another order
            raise Fault(f"loaded again its loss is {again}, the run's was {result.done.tuned['loss']}")
        return
    theirs = logits(peer_of(result, model, peer), ids)[:, -ids.shape[-1] :]  # PEFT returns a prompt's too
    away = float((theirs - ours).abs().max())
    limit = 1e-4 if is_prefix(result) else 0.0
    if not away <= limit:
        raise Fault(f"differs from {peer} by {away:.1e}")


def is_prefix(result: TuneResult) -> bool:
    """Whether a run leaves a prefix, which PEFT's attention adds up in another order."""
    file = result.path / "adapter_config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["peft_type"] == "PREFIX_TUNING"


def peer_of(result: TuneResult, model: Path, peer: str) -> Any:
    """Load the result of a run as its users do, without Fleetune."""
    kind = AutoModelForSequenceClassification if model.name in ENCODERS else AutoModelForCausalLM
    if peer == "peft":
        net = PeftModel.from_pretrained(kind.from_pretrained(model), str(result.path))
        return net.eval().requires_grad_(False)
    written = fleetune.export(result, to="hf", path=result.folder / "hf")
    # a ledger's run states that of its weights
    if result.path.is_file() and written.done.digest != result.digest:
        raise Fault("the directory has other weights than the run")
    return kind.from_pretrained(written.path).eval().requires_grad_(False)


@torch.inference_mode()
def logits(net: Any, ids: Tensor) -> Tensor:
    """Return what a net gives for rows without padding."""
    found: Tensor = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def cell(model: Path, column: str, out: Path) -> str:
    """Return `ok`, the first line of an error of ours, or `FAULT: ` and what is wrong."""
    try:
        if column in SOLVERS:
            fleetune.compress(model, method=column, settings=SOLVERS[column], windows=4, length=32, out=out)
        else:
            check(tune(model, COLUMNS[column], out), model, COLUMNS[column].peer)
    except FleetuneError as error:
        if cause := LOST.search(error.message):  # a client's error, which the fleet counts as a refusal
            return f"FAULT: {cause[1]}"
        return error.message.splitlines()[0]
    except Exception as error:
        return f"FAULT: {type(error).__name__}: {error}".splitlines()[0]
    return "ok"
