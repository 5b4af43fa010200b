# SPDX-License-Identifier: Apache-2.0
"""The files that the docs' commands name are made as the docs say."""

from __future__ import annotations

import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fleetune import data, models
from fleetune.errors import DataError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no package of the wheel

from benchmarks import inputs, unlike_clients  # noqa: E402

PLAY = """<PLAY><ACT><SCENE>
<SPEECH><SPEAKER>A</SPEAKER><LINE>One,</LINE><STAGEDIR>Exit B</STAGEDIR><LINE>two.</LINE></SPEECH>
<SPEECH><SPEAKER>B</SPEAKER><LINE>Three.</LINE></SPEECH>
</SCENE><SCENE><SPEECH><SPEAKER>B</SPEAKER><LINE>Four.</LINE></SPEECH></SCENE></ACT></PLAY>"""


def made(sources: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["inputs", str(sources), str(out)])
    return inputs.main()


def test_the_table_of_files_is_that_of_the_program() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", page))
    assert rows == inputs.DIGESTS


def test_a_speech_has_the_last_line_before_it_as_its_cue() -> None:
    found = list(inputs.speeches(ElementTree.fromstring(PLAY)))
    assert found == [("A", "", "One,\ntwo."), ("B", "two.", "Three."), ("B", "", "Four.")]


def test_roles_can_be_read_and_are_marked_when_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "shakespeare.zip", "w") as archive:
        archive.writestr("shakespeare/play.xml", PLAY)
    assert made(tmp_path, tmp_path, monkeypatch) == 1
    assert "NOT the file that was measured" in capsys.readouterr().out
    (row,) = data.read(str(tmp_path / "roles.jsonl"))
    assert (row.messages, row.response, row.meta["client"]) == ((("user", "two."),), "Three.", "play/B")
    unlike_clients.check(str(tmp_path / "roles.jsonl"), "client")
    with pytest.raises(DataError, match="no column 'category'"):
        unlike_clients.check(str(tmp_path / "roles.jsonl"), "category")


def test_dolly_rows_are_drawn_by_category_and_none_twice() -> None:
    rows = [
        {"instruction": f"{kind} {i % 250}", "context": "", "response": "yes", "category": kind}
        for kind in "ab"
        for i in range(500)
    ]
    test = [{"instruction": "a 0", "context": "", "response": "no", "category": "a"}]
    train, held = inputs.drawn([*rows, rows[0] | {"instruction": "long", "context": "x" * 1200}], test)
    assert [row["category"] for row in train] == ["a"] * 220 + ["b"] * 220
    assert [row["category"] for row in held] == ["a"] * 20 + ["b"] * 20
    names = [row["instruction"] for row in train + held]
    assert len(set(names)) == 480
    assert not {"a 0", "long"} & set(names)
    assert names != sorted(names)


def test_weights_of_llama2c_get_the_names_and_layout_of_transformers(tmp_path: Path) -> None:
    width, inner, layers, heads, shared, words = 8, 12, 2, 2, 1, 512
    sizes = [words * width, layers * width, layers * width * 8, layers * 4 * width, layers * 4 * width]
    sizes += [layers * width * 8, layers * width, layers * inner * width * 3, width]
    flat = np.arange(sum(sizes), dtype=np.float32)
    found = inputs.weights(flat, width, inner, layers, heads, shared, words)
    assert sum(t.size for t in found.values()) == flat.size
    start = sum(sizes[:2])
    query = flat[start : start + width * 8].reshape(8, 8)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"], query[[0, 2, 1, 3, 4, 6, 5, 7]])
    (tmp_path / "stories260K.bin").write_bytes(
        struct.pack("7i", width, inner, layers, heads, shared, words, 16) + (flat / flat.size).tobytes()
    )
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), " a", " ", "a"]
    pieces += [chr(0x4E00 + i) for i in range(words - len(pieces))]
    coded = [piece.encode() for piece in pieces]
    (tmp_path / "tok512.bin").write_bytes(
        struct.pack("i", 9) + b"".join(struct.pack("fi", 0.0, len(p)) + p for p in coded)
    )
    for name, content in inputs.stories(tmp_path).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    model = models.load(str(tmp_path / "stories260K-hf"))
    assert model.tokenizer("a a")["input_ids"] == [1, 259, 259]
    assert json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]["merges"] == [["▁", "a"]]
