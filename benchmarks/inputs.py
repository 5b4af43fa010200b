# SPDX-License-Identifier: Apache-2.0
"""Make the files that the commands of the docs name, from their public sources.

    python -m benchmarks.inputs SOURCES OUT

SOURCES is a folder with what was downloaded; what is not there is left out.

    local_training_0.json .. _9.json, global_test.json   Dolly, cut for ten clients
        github.com/ZeenathulNizreen/FedAgg, commit 59cd0654, folder data/10
    valid.txt, test.txt                                  WikiText-2, the version with <unk>
        github.com/pytorch/examples, commit 77f55b91, folder word_language_model/data/wikitext-2
    dev.tsv                                              QNLI's development set
        github.com/llm-eff/FedPepTAO, commit 84311d5e, folder datasets/qnli
    shakespeare.zip                                      eight plays
        github.com/nltk/nltk_data, commit 5db857e6, folder packages/corpora
    stories260K.bin, tok512.bin                          the model in the form of llama2.c
        github.com/DaveBben/esp32-llm, commit 934dab4d, folder data

Every file is printed with its rows and its SHA-256; one that is not byte for byte what the docs measured is marked
(benchmarks/README.md, "Files used").
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

Row = dict[str, str]

SEED: Final = 20240229  # of the draw of Dolly rows
ROLES: Final = 12
LINES: Final = 40  # of a role, at most
DIGESTS: Final = {
    "databricks-dolly-15k.jsonl": "1629f7b74b317f212b82c9825f1ba6a5fc858ee1b2d91590a3e430402b5a9447",
    "demo_train.jsonl": "032fe31ec401b899c13040f0d5903941009ab522b3f3ba860471f9ad324201a0",
    "demo_eval.jsonl": "5e40544fab483a7f02d92ffb9c648ec49960a2b51c1ea54cd0e4a65a3792fe3f",
    "dolly.txt": "3e5e8ea433a4d78118a36937b431934d35cf1b1031515cf837b05c37cecb6d71",
    "wiki.valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wiki.test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "qnli-train.jsonl": "5309374d27221e064df4419c3466ce901d6aad2b9728907e04dd05e900c61496",
    "qnli-test.jsonl": "e4c346baf8a0d01c1175fe14f223defd5b9ec9d9d2d967cb028d73578f41c355",
    "roles.jsonl": "07d035935775eda09f804fc36c7315f1c0a579df62f689ee13fd58957ab88166",
    "stories260K-hf/model.safetensors": "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd",
    "stories260K-hf/tokenizer.json": "d9bbb431a9cdb30aa643ed6afb4fc7e5c747a009b973e1cad334478358c0089a",
}


# --- Dolly ----------------------------------------------------------------------------------------------------


def dolly(sources: Path) -> dict[str, bytes]:
    """Join the parts in the order of Shepherd's ten clients; draw 220 + 20 rows of each category, the 20 as a text too."""
    parts = [sources / f"local_training_{i}.json" for i in range(10)]
    rows: list[Row] = [row for part in parts for row in json.loads(part.read_text(encoding="utf-8"))]
    test: list[Row] = json.loads((sources / "global_test.json").read_text(encoding="utf-8"))
    train, held = drawn(rows, test)
    return {
        "databricks-dolly-15k.jsonl": jsonl(rows + test),
        "demo_train.jsonl": jsonl(train),
        "demo_eval.jsonl": jsonl(held),
        "dolly.txt": "\n\n".join(
            "\n".join(filter(None, (r["instruction"], r["context"], r["response"]))) for r in held
        ).encode(),
    }


def drawn(rows: Iterable[Row], test: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Draw 220 + 20 rows of each category.

    A row has an answer of two characters or more, at most 1,200 characters in all, and an instruction and context that
    no earlier row and no row of `test` has.
    """
    seen = {(row["instruction"], row["context"]) for row in test}
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        question = row["instruction"], row["context"]
        length = sum(len(row[name]) for name in ("instruction", "context", "response"))
        if question not in seen and length <= 1200 and len(row["response"]) > 1:
            seen.add(question)
            kinds.setdefault(row["category"], []).append(row)
    order, train, held = random.Random(SEED), list[Row](), list[Row]()
    for kind in sorted(kinds):
        order.shuffle(kinds[kind])
        train += kinds[kind][:220]
        held += kinds[kind][220:240]
    return train, held


# --- WikiText-2 -----------------------------------------------------------------------------------------------


def wikitext(sources: Path) -> dict[str, bytes]:
    """Name the two parts, as they are."""
    return {f"wiki.{part}.txt": (sources / f"{part}.txt").read_bytes() for part in ("valid", "test")}


# --- QNLI -----------------------------------------------------------------------------------------------------


def qnli(sources: Path) -> dict[str, bytes]:
    """Cut the development set: all but the last 1,000 rows, and these."""
    lines = (sources / "dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [
        dict(zip(("question", "sentence", "label"), line.split("\t")[1:], strict=True)) for line in lines[1:]
    ]
    return {"qnli-train.jsonl": jsonl(rows[:-1000]), "qnli-test.jsonl": jsonl(rows[-1000:])}


# --- Shakespeare ----------------------------------------------------------------------------------------------


def shakespeare(sources: Path) -> dict[str, bytes]:
    """Twelve roles from the longest to the shortest: every 25th of 295, the first 40 speeches of each.

    A row is a speech (`response`), its cue (the last line of the speech before it in the scene, `instruction`) and
    its role (`client`).  Speeches that open a scene have no cue and are left out.
    """
    said: dict[str, list[Row]] = {}
    with zipfile.ZipFile(sources / "shakespeare.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".xml")):
            for role, cue, speech in speeches(ElementTree.fromstring(archive.read(name))):
                client = f"{Path(name).stem}/{role}"
                said.setdefault(client, []).append({"instruction": cue, "response": speech, "client": client})
    longest = sorted(said, key=lambda role: (-len(said[role]), role))
    chosen = longest[:: -(-len(longest) // ROLES)]
    return {
        "roles.jsonl": jsonl(
            row for role in chosen for row in [r for r in said[role] if r["instruction"]][:LINES]
        )
    }


def speeches(play: ElementTree.Element) -> Iterator[tuple[str, str, str]]:
    """Yield (role, cue, speech) in the order of the play."""
    for scene in play.iterfind("ACT/SCENE"):
        cue = ""
        for speech in scene.iterfind("SPEECH"):
            lines = [text for line in speech.iterfind("LINE") if (text := "".join(line.itertext()).strip())]
            if lines:
                yield "".join(speech.find("SPEAKER").itertext()).strip(), cue, "\n".join(lines)
                cue = lines[-1]


# --- stories260K ----------------------------------------------------------------------------------------------


def stories(sources: Path) -> dict[str, bytes]:
    """Turn llama2.c's two files of stories260K (A. Karpathy, karpathy/tinyllamas) into a Hugging Face directory."""
    model = (sources / "stories260K.bin").read_bytes()
    width, inner, layers, heads, shared, words, length = struct.unpack("7i", model[:28])
    tensors = weights(np.frombuffer(model, "<f4", offset=28), width, inner, layers, heads, shared, words)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": shared, "vocab_size": words, "max_position_embeddings": length,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    files = {
        "config.json": _json(config),
        "model.safetensors": save(tensors, {"format": "pt"}),
        "tokenizer.json": tokenizer((sources / "tok512.bin").read_bytes()),
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **marks}),
    }
    return {f"stories260K-hf/{name}": content for name, content in files.items()}


def weights(
    flat: np.ndarray, width: int, inner: int, layers: int, heads: int, shared: int, words: int
) -> dict[str, np.ndarray]:
    """Name llama2.c's weights as transformers does; rotary pairs (0, 1), (2, 3), .. become halves."""
    at, half = 0, width // heads // 2

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        part = flat[at : at + math.prod(shape)].reshape(shape)
        at += part.size
        return part

    def halves(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(layers, -1, half, 2, width).swapaxes(2, 3).reshape(matrix.shape)

    keys = 2 * half * shared
    made = {"model.embed_tokens.weight": take(words, width)}
    stacked = {
        "input_layernorm": take(layers, width), "self_attn.q_proj": halves(take(layers, width, width)),
        "self_attn.k_proj": halves(take(layers, keys, width)), "self_attn.v_proj": take(layers, keys, width),
        "self_attn.o_proj": take(layers, width, width), "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width), "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }  # fmt: skip
    made["model.norm.weight"] = take(width)
    for name, of_layers in stacked.items():
        made |= {f"model.layers.{i}.{name}.weight": one for i, one in enumerate(of_layers)}
    return {name: np.ascontiguousarray(made[name]) for name in sorted(made)}


def tokenizer(stored: bytes) -> bytes:
    """Make tokenizer.json: pieces in the order of their ids, and every way to merge two of them into a third."""
    at, pieces = 4, ["<unk>", "<s>", "</s>"]
    for number in range(512):
        (length,) = struct.unpack("i", stored[at + 4 : at + 8])
        if number > 2:
            pieces.append(stored[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        at += 8 + length
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[3 + 256 :]:
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += sorted(
            (s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]])
        )
    made = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in pieces[:3]])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:0 $B:0", special_tokens=[("<s>", 1)]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made.to_str(pretty=True).encode()


# --- Files ----------------------------------------------------------------------------------------------------

MAKERS: Final[dict[str, Callable[[Path], dict[str, bytes]]]] = {
    "global_test.json": dolly, "valid.txt": wikitext, "dev.tsv": qnli, "shakespeare.zip": shakespeare, "stories260K.bin": stories
}  # fmt: skip


def jsonl(rows: Iterable[Row]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def main() -> int:
    """Make what can be made; 1 where nothing can, or a file is not the one that was measured."""
    parser = argparse.ArgumentParser(
        "benchmarks.inputs", description="The files that the docs' commands name."
    )
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    makers = [maker for name, maker in MAKERS.items() if (asked.sources / name).is_file()]
    if not makers:
        parser.error(
            f"{asked.sources} has none of {', '.join(MAKERS)}; benchmarks/inputs.py says where they are from"
        )
    same = True
    for name, content in (item for maker in makers for item in maker(asked.sources).items()):
        path: Path = asked.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        fits = digest == DIGESTS.get(name, digest)  # the two small files of the model's folder have none
        same &= fits
        lines = content.count(b"\n")
        rows = f"{lines:,} rows" if path.suffix == ".jsonl" else f"{len(content):,} bytes"
        print(f"{name:30}{rows:>16}  {digest}{'' if fits else '  NOT the file that was measured'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
