"""Hostile model directories: every file damaged in every way, and those that an attack found.

Loading one is either refused by an error of ours within the time, or gives a model.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hostile
from fault_report import Injected
from fleetune import data, models
from fleetune.data.encode import encode_rows
from fleetune.deploy.checkpoint import open_checkpoint
from hostile import put, refusal

Change = Callable[[Path], None]
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
ROWS = [data.Example((("user", "what is 2 and 2?"),), "four", {})]


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a directory, in one file and (beside it) in shards."""
    root = tmp_path_factory.mktemp("honest")
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, root / "one")
    shutil.copytree(root / "one", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    tiny.net.save_pretrained(root / "shards", max_shard_size="30KB")
    return root


def use(folder: Path) -> None:
    """What every command does with a model's directory before its first step."""
    model = models.load(str(folder), device="cpu", offline=True)
    encode_rows(model, ROWS, 64)
    model.net(torch.tensor([[1, 2, 3]]))


def config(**values: Any) -> Change:
    return edit("config.json", **values)


def edit(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        put(file, json.dumps({**json.loads(file.read_bytes()), **values}).encode())

    return change


def write(name: str, text: bytes | str) -> Change:
    return lambda folder: put(folder / name, text.encode() if isinstance(text, str) else text)


def weights(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors = {n: t.clone() for n, t in tensors.items()}
        tensors[name] = change(tensors[name]).contiguous()
        file.unlink()
        save_file(tensors, file, {"format": "pt"})

    return apply


def spoil(value: float, dtype: torch.dtype = torch.float32) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor.to(dtype)

    return change


def template(text: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit("tokenizer_config.json", chat_template=text)(folder)

    return change


def index(value: Any) -> Change:
    return write(INDEX, value if isinstance(value, bytes) else json.dumps(value))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
MUST_REFUSE: dict[str, Change] = {
    "config.json deep": write("config.json", b"[" * hostile.DEEP),
    "architectures = 5": config(architectures=5),
    "hidden_act unknown": config(hidden_act="nonesuch"),
    "a kernel to fetch": config(attn_implementation="kernels-community/flash-attn2"),
    "a kernel within": config(text_config={"attn_implementation": {"": "flash_attention_2"}}),
    "chat_template = 5": template(5),
    "chat_template includes": template("{% include 'x' %}"),
    "not a template": template("{% for %}"),
    "a template that is deep": template("{{ " + "(" * 50_000 + " }}"),
    "generation_config.json = []": write("generation_config.json", b"[]"),
    **{f"{n} layers": config(num_hidden_layers=n) for n in (600, 2**31 - 1)},
    "10^9 labels": config(num_labels=10**9),
    "no heads": config(num_attention_heads=0),
    **{f"vocabulary of 2^{n}": config(vocab_size=2**n) for n in (30, 40)},
    **{f"a context of {n}": config(max_position_embeddings=n) for n in (-1, 10**15)},
    "inner width of 2^36": config(intermediate_size=2**36),
    "a NaN": weights(UP, spoil(float("nan"))),
    "an inf in fp16": weights(UP, spoil(float("inf"), torch.float16)),
    "rms_norm_eps NaN": config(rms_norm_eps=float("nan")),
}
MUST_REFUSE_SHARDS: dict[str, Change] = {
    "index = []": index([]),
    "index shard 5": index({"weight_map": {NORM: 5}}),
    "index deep": index(b"[" * hostile.DEEP),
    "index elsewhere": index({"weight_map": {NORM: "../one/model.safetensors"}}),
}


@pytest.mark.parametrize("case", [*MUST_REFUSE, *MUST_REFUSE_SHARDS])
def test_a_folder_that_an_attack_found_is_refused(honest, tmp_path, case):
    shutil.copytree(honest / ("one" if case in MUST_REFUSE else "shards"), tmp_path / "x")
    (MUST_REFUSE | MUST_REFUSE_SHARDS)[case](tmp_path / "x")
    assert refusal(lambda: use(tmp_path / "x")), f"{case}: accepted"
    if re.match(r"hidden|\d+ layers|voc|inner|a context", case):  # an export builds a net, too
        assert refusal(lambda: open_checkpoint(tmp_path / "x")), f"{case}: exported"


def test_the_honest_ones_are_accepted(honest):
    assert refusal(lambda: use(honest / "one")) is None
    assert refusal(lambda: use(honest / "shards")) is None


def damaged(folder: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """(file, what was done to it, its new bytes) for every file of a model's directory."""
    for file in sorted(folder.iterdir()):
        is_json = file.suffix == ".json"
        raw = file.read_bytes()
        for what, changed in hostile.mutants(raw, is_json=is_json, seed=file.name).items():
            yield file.name, what, changed
        if file.name in ("config.json", "tokenizer_config.json", "generation_config.json", INDEX):
            for what, changed in hostile.values(raw).items():
                yield file.name, what, changed


def sweep(folder: Path, work: Path, every: int, injected: Injected) -> dict[str, int]:
    """Damage each file in each way (one in `every`), and use the folder; return how many were what."""

    def made(file: str, changed: bytes | None) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        put(work / file, changed)

    cases = islice(damaged(folder), None, None, every)
    each = ((f"{file}, {what}", partial(made, file, changed)) for file, what, changed in cases)
    return hostile.survived("damaged model folders", each, lambda: use(work), injected)


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.faults)], ids=["a sample", "all"])
@pytest.mark.parametrize("form", ["one", "shards"])
def test_damaged_folders(honest, tmp_path, injected, form, every):
    assert sweep(honest / form, tmp_path / "x", every, injected)["refused"] >= 5
