"""Say in our words what other tools call otherwise: tables for the command line, recipes and exports, and how one is read.

A word of ours is an option's name, `set.NAME` for a setting of the method, or `NAME=VALUE`, whatever value is given.
"""

from collections.abc import Mapping
from typing import Any, Final


def _table(text: str) -> dict[str, str]:
    """Return our words by theirs, of a text "ours: theirs theirs | ours: theirs"."""
    pairs = (entry.split(": ") for line in text.strip().splitlines() for entry in line.strip().split(" | "))
    return {word: ours for ours, theirs in pairs for word in theirs.split()}


COMMANDS: Final = _table("""
    tune: train finetune fine-tune sft | tune --method fedit: lora | tune --method fedit --base mapped: qlora
    models pull: pull download | models: list ls | models rm: rm | runs: ps | runs show: show
    chat: run generate | eval: evaluate | measure: benchmark
    compress: quantize | export: convert | export --to hf: fuse merge
""")
ACTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "fleet": {"log": "logs", "start": "serve", "server": "serve", "client": "join", "connect": "join"},
    "models": {"ls": "list", "get": "pull", "download": "pull", "remove": "rm", "delete": "rm"},
    "runs": {"ls": "list", "info": "show", "diff": "compare", "remove": "rm", "delete": "rm"},
}
USUAL_ACTION: Final = {"data": "check", "models": "list", "runs": "show"}  # where a name takes its place
ELSEWHERE: Final = {  # what is done without a command
    "kick": "take NAME.pub out of the server's --keys folder: the device is thrown out within seconds",
    "leave": "Ctrl-C on the device, or end its process: the round goes on without it after --grace seconds",
}
# of commands with a recipe's options, and of the recipe itself; `epochs` and `steps`: see `meaning`
RECIPE: Final = _table("""
    set.lr: lr learning_rate | set.batch_size: batch_size micro_batch_size per_device_train_batch_size
    set.r: r rank lora_r lora_rank | set.alpha: alpha lora_alpha | set.dropout: dropout lora_dropout
    set.mu: proximal_mu mu | participation: fraction_fit fraction_train | noise: noise_multiplier | clip_norm: clipping_norm
    set.targets: targets target_modules lora_target lora_target_modules lora_keys | set.targets=all-linear: lora_target_linear
    set.weight_decay: weight_decay | set.clip: max_grad_norm | set.checkpointing: gradient_checkpointing
    epochs: epochs num_epochs num_train_epochs | set.epochs: local_epochs
    steps: iters max_steps | set.steps: local_steps
    rounds: num_rounds num_server_rounds | clients: num_clients num_supernodes
    max_length: max_seq_length max_seq_len sequence_len cutoff_len
    model: base_model model_name_or_path | data: dataset datasets train_file
    eval_data: eval_dataset validation_file | held_out: val_set_size val_size | limit: max_samples
    dtype: torch_dtype | dtype=bf16: bf16 | dtype=fp16: fp16
    method: adapter finetuning_type fine_tune_type | method=lora: lora | method=qlora: qlora
    base=mapped: load_in_4bit load_in_8bit quantization_bit bits
    out: output_dir o adapter_path | tracker: report_to | resume: resume_from_checkpoint
""")
OPTIONS: Final = {  # of the other commands
    "compress": _table("""
        out: o output output_dir | bits: wbits q_bits type ftype | set.group: group group_size q_group_size
        set.grid: grid | set.damping: damping | set.sparsity: sparsity | set.ratio: ratio
        set.teacher: teacher | set.steps: steps | set.lr: lr
    """),
    "export": _table("""
        path: o output outfile save_path mlx_path | to: outtype format f target | model: hf_path model
    """),
    "chat": _table("prompt: p | temperature: temp | max_tokens: max_new_tokens n_predict"),
}
_K: Final = ("k", "k_s", "k_m", "k_l")
_SIZES: Final = {f"q{bits}_{end}": str(bits) for bits in (4, 5) for end in ("0", "1", *_K)}
TYPES: Final = {  # of llama.cpp, which a compression makes: its options
    **{name: f"--bits {bits}" for name, bits in (_SIZES | {"iq4_xs": "4"}).items()},
    **{f"q{bits}_{end}": f"--set grid=q{bits}_k" for bits in (2, 3, 6) for end in _K},
    "iq4_nl": "--fast",
}
DONE_ANYWAY: Final = ("train", "do_train")  # flags without a value, which our command means itself
VALUES: Final[Mapping[str, Mapping[str, str]]] = {
    "method": _table("fedit: lora qlora fedavg | optq: gptq | gkd: distillation"),
    "set.targets": {"all": "all-linear"},
    "bits": {**_SIZES, "q8_0": "8"},
    "dtype": _table("bf16: bfloat16 | fp16: float16 half | fp32: float32"),
    "to": _table("""
        gguf: llama.cpp | gguf:q8_0: q8_0 | gguf:f16: f16 fp16 gguf:fp16 | gguf:bf16: bf16 | gguf:f32: f32 fp32 gguf:fp32
        hf: safetensors huggingface transformers | compressed-tensors: vllm
    """),
}
REMARKS: Final = {  # of a word of ours, where it is not quite the same
    "base=mapped": "the bits are those of the model's file: give a 4-bit GGUF file, or a built-in name (fleetune models)",
    "epochs": "a round is one pass over the rows of each client, for methods that count epochs",
    "steps": "rounds times steps, of each client",
}
TOPICS: Final = _table("""
    troubleshooting: errors error exit-codes problems | your-own-data: start quickstart tutorial
    to-a-phone: phone android | learning-rate: lr rate | compression: compress quantize quantization
    api: python notebook | serve: chat | columns-with-other-names: columns | with-a-flower-of-your-own: supernode superlink
    privacy: secagg dp | flowers-simulation: simulation ray | methods: fedprox | flower: flowertune strategy fraction_fit
""")  # of `fleetune help`: the page that is meant


def meaning(word: str, value: Any, *, each_round: bool = False) -> dict[str, Any]:
    """Return what a word of ours from a table says with a value: our options, and `set.NAME`, by name.

    Passes and steps are counted over the whole run elsewhere; `each_round`: here, because the rounds are given.
    """
    name, _, fixed = word.partition("=")
    said = str(value).lower()
    if fixed:
        return {} if said in ("false", "0") else meaning(name, fixed)
    if name in ("epochs", "steps") and each_round:
        return {f"set.{name}": value}
    if name == "epochs":
        return {"rounds": value}
    if name == "steps":
        count = max(int(value), 1)
        return {"rounds": (rounds := min(10, count)), "set.steps": -(-count // rounds)}
    base = {"base": "mapped"} if (name, said) == ("method", "qlora") else {}
    return {name: VALUES.get(name, {}).get(said, value), **base}
