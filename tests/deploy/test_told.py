# SPDX-License-Identifier: Apache-2.0
"""What `fleetune compress` tells at its end: sizes of the same thing side by side, and an export that will work."""

from __future__ import annotations

from pathlib import Path

import pytest
from deploy_harness import tiny
from transformers import OPTConfig, OPTForCausalLM

from fleetune import models
from fleetune.cli.main import main
from fleetune.common.display import human_bytes

RTN = ("--method", "rtn", "--set", "group=8")


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["compress", *args]) == 0
    return capsys.readouterr().out


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, in the folder that we are in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The heron stood still in the shallow water. " * 8)
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        (RTN, "compressed-tensors"),
        (("--method", "rtn", "--set", "group=32"), "gguf"),
        (("--method", "rtn", "--set", "bits=3"), "gguf"),
        (("--method", "rtn", "--set", "grid=universal"), "gguf"),
    ],
)
def test_the_next_command_is_one_that_works(
    settings: tuple[str, ...], target: str, m: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(capsys, str(m), *settings)
    following = out.split("next")[1].split()
    assert following[:2] == ["fleetune", "export"]
    assert following[3:] == ["--to", target]
    assert main(following[1:]) == 0


def test_a_family_without_a_gguf_file_goes_elsewhere(m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OPTConfig(
        vocab_size=264,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    net = OPTForCausalLM(config)
    models.save(net, tiny().tokenizer, m.parent / "other")
    out = told(capsys, str(m.parent / "other"), "--method", "rtn")
    assert out.split("next")[1].split()[3:] == ["--to", "compressed-tensors"]


def test_sizes_are_of_weights_before_and_after(m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not of tokenizers: a pruned model is as large after its recovery as before it."""
    prune = ["llm-pruner", "--text", "text.txt", "--length", "16", "--windows", "4"]
    few = [x for s in ("first=0", "last=0", "round_to=8", "steps=1", "batch_size=1") for x in ("--set", s)]
    out = told(capsys, str(m), "--method", *prune, *few)
    sizes = next(line for line in out.splitlines() if line.strip().startswith("weights")).split()[1::2]
    assert sizes[0] == human_bytes(4 * tiny().n_params).split()[0]
    before, pruned, after = map(float, sizes)
    assert pruned < before
    assert after == pytest.approx(pruned, rel=0.05)  # and a header
