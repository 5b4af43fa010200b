"""The YAML of axolotl, LLaMA-Factory and mlx-lm as a recipe."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from fleetune.errors import RecipeError
from fleetune.tuning.recipe import recipe

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_r: 8
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
seed: 7
special_tokens:
  pad_token: x
"""
FACTORY = """
model_name_or_path: Qwen/Qwen3-0.6B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine
template: qwen3
cutoff_len: 1024
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
warmup_ratio: 0.1
bf16: true
val_size: 0.1
"""
MLX = """
model: mlx-community/Llama-3.2-1B-Instruct
train: true
fine_tune_type: lora
data: data/
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
learning_rate: 1e-5
max_seq_length: 512
grad_checkpoint: false
lora_parameters:
  keys: [q_proj, v_proj]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""
SAME = {"method": "fedit", "clients": 1}
CASES = {
    "axolotl": (
        AXOLOTL,
        {"model": "NousResearch/Llama-3.2-1B", "data": "rows.jsonl", "base": "mapped", "rounds": 3}
        | {"max_length": 2048, "held_out": 0.05, "seed": 7},
        {"r": 8, "alpha": 32, "dropout": 0.05, "targets": "all-linear"}
        | {"batch_size": 8, "lr": 2e-4, "checkpointing": "true"},
        "has no place here: output_dir = ./out, optimizer = adamw_8bit, lr_scheduler = cosine, special_tokens",
    ),
    "LLaMA-Factory": (
        FACTORY,
        {"model": "Qwen/Qwen3-0.6B", "data": "data/mine.json", "rounds": 3, "max_length": 1024, "limit": 1000}
        | {"dtype": "bf16", "held_out": 0.1},
        {"r": 8, "targets": "all-linear", "batch_size": 8, "lr": 1e-4},
        "has no place here: warmup_ratio = 0.1",
    ),
    "mlx-lm": (
        MLX,
        {"model": "mlx-community/Llama-3.2-1B-Instruct", "data": "data/", "seed": 0}
        | {"rounds": 10, "max_length": 512},
        {"r": 8, "alpha": 160, "dropout": 0.0, "targets": "q_proj,v_proj"}
        | {"batch_size": 4, "lr": "1e-5", "steps": 100},
        "has no place here: num_layers = 16",
    ),
}


@pytest.mark.parametrize("tool", CASES)
def test_a_file_of_another_tool_is_read_as_a_recipe(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    text, values, settings, left = CASES[tool]
    Path("their.yml").write_text(text)
    told: list[str] = []
    found = recipe.read(Path("their.yml"), told.append)
    assert found == {**SAME, **values, "set": settings}
    assert told[0].startswith("their.yml is read as: ")
    assert told[1] == left
    made = recipe.make(found)
    assert (made.model, made.rounds, made.clients) == (values["model"], values["rounds"], 1)


def test_what_changes_the_training_is_never_left_out_silently(tmp_path):
    (path := tmp_path / "dpo.yaml").write_text(
        "model: m\ndata: d\nfine_tune_type: full\nstage: dpo\ntrain_on_inputs: true\ndatasets: [{path: a}, {path: b}]\n"
    )
    told: list[str] = []
    assert recipe.read(path, told.append) == {**SAME, "model": "m", "data": "d", "set": {}}
    left = "has no place here: fine_tune_type = full, stage = dpo, train_on_inputs = True, datasets"
    assert told[1] == left


CALLS = "!!python/object/apply:os.system ['touch gone']"


@pytest.mark.parametrize("text", ["a: [", "- x", "5", "", CALLS, "a: &a [*a", "\x00", "[" * 9999])
def test_what_is_no_such_file_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "x.yml").write_text(text)
    with pytest.raises(RecipeError):
        recipe.read(path)
    assert not Path("gone").exists()


def test_a_file_that_grows_when_it_is_written_out_is_read(tmp_path):
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names)]
    (path := tmp_path / "bomb.yml").write_text("\n".join([*lines, "model: m", "datasets: *i"]))
    told: list[str] = []
    assert recipe.read(path, told.append)["model"] == "m"
    assert sum(map(len, told)) < 1000
