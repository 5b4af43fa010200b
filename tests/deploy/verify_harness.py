"""A tiny base, a run of each kind, a compression, exported files and a release, once a session; and a flipped bit."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy_harness import tiny

import fleetune
from command_line import FEW

ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(24)]
RUN, ADAPTER, CODES = "0001-fedkseed-tiny", "0002-fedit-tiny", "0003-rtn-fedkseed-tiny"


def make(folder: Path) -> None:
    """Fill the folder, which is the one that we are in."""
    tiny("llama").save(folder / "tiny")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for method, settings in (
        ("fedkseed", {"K": 16, "tau": 2, "lr": 1e-2, "batch_size": 2}),
        ("fedit", {"r": 2, "steps": 1, "batch_size": 2, "lr": 1e-2}),
    ):
        fleetune.tune("tiny", "rows.jsonl", method=method, settings=settings, **FEW)
    fleetune.compress("1", method="rtn")
    for name, to in (("1", "hf"), ("1", "gguf:q8_0"), ("2", "gguf:lora"), *(("3", to) for to in FILES)):
        fleetune.export(name, to=to)
    fleetune.release("1")
    fleetune.release("2")


DIRECTORIES = ("gptq", "compressed-tensors", "mlx", "ollama")
# of the compression
FILES = {"gguf": f"{CODES}.gguf", **{to: to for to in DIRECTORIES}, "hf:bf16": "hf-bf16"}


def proven(*words: str, **given: object) -> dict[str, str]:
    """What is proven of something, with the words."""
    links = fleetune.verify(*words, offline=True, **given)  # type: ignore[arg-type]
    return {link.what: link.words for link in links if link.state == "proven"}


@contextmanager
def flipped(file: Path, at: int, bit: int) -> Iterator[None]:
    """Have one bit of a file flipped while the block runs; its times stay what they were."""
    times, data = file.stat(), file.read_bytes()
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    try:
        for content in (bytes(changed), data):
            file.write_bytes(content)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            if content != data:
                yield
    finally:
        file.write_bytes(data)
