"""Say in our words what other tools call otherwise: tables for the command line, recipes and exports, and how one is read.

A word of ours is an option's name, `set.NAME` for a setting of the method, or `NAME=VALUE`, whatever value is given.
"""

from collections.abc import Mapping
from typing import Any, Final

COMMANDS: Final = {
    "train": "tune",
    "finetune": "tune",
    "fine-tune": "tune",
    "sft": "tune",
    "lora": "tune --method fedit",
    "qlora": "tune --method fedit --base mapped",
    "run": "chat",
    "generate": "chat",
    "pull": "models pull",
    "download": "models pull",
    "list": "models",
    "ls": "models",
    "rm": "models rm",
    "show": "runs show",
    "ps": "runs",
    "quantize": "compress",
    "convert": "export",
    "fuse": "export --to hf",
    "merge": "export --to hf",
    "evaluate": "eval",
    "benchmark": "measure",
}
ACTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "fleet": {"start": "serve", "server": "serve", "client": "join", "connect": "join"},
    "models": {"ls": "list", "get": "pull", "download": "pull", "remove": "rm", "delete": "rm"},
    "runs": {"ls": "list", "info": "show", "diff": "compare", "remove": "rm", "delete": "rm"},
}
RECIPE: Final = {  # of commands with a recipe's options, and of the recipe itself
    "lr": "set.lr",
    "learning_rate": "set.lr",
    "batch_size": "set.batch_size",
    "micro_batch_size": "set.batch_size",
    "per_device_train_batch_size": "set.batch_size",
    "local_epochs": "set.epochs",
    "local_steps": "set.steps",
    "r": "set.r",
    "rank": "set.r",
    "lora_r": "set.r",
    "lora_rank": "set.r",
    "alpha": "set.alpha",
    "lora_alpha": "set.alpha",
    "dropout": "set.dropout",
    "lora_dropout": "set.dropout",
    "targets": "set.targets",
    "target_modules": "set.targets",
    "lora_target": "set.targets",
    "lora_target_modules": "set.targets",
    "lora_target_linear": "set.targets=all-linear",
    "lora_keys": "set.targets",
    "weight_decay": "set.weight_decay",
    "max_grad_norm": "set.clip",
    "gradient_checkpointing": "set.checkpointing",
    "epochs": "epochs",  # see `meaning`
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "iters": "steps",
    "max_steps": "steps",
    "num_rounds": "rounds",
    "num_server_rounds": "rounds",
    "num_clients": "clients",
    "num_supernodes": "clients",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "datasets": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "val_set_size": "held_out",
    "val_size": "held_out",
    "max_samples": "limit",
    "torch_dtype": "dtype",
    "bf16": "dtype=bf16",
    "fp16": "dtype=fp16",
    "adapter": "method",
    "finetuning_type": "method",
    "fine_tune_type": "method",
    "lora": "method=lora",
    "qlora": "method=qlora",
    "load_in_4bit": "base=mapped",
    "load_in_8bit": "base=mapped",
    "quantization_bit": "base=mapped",
    "bits": "base=mapped",
    "output_dir": "out",
    "o": "out",
    "adapter_path": "out",
    "report_to": "tracker",
    "resume_from_checkpoint": "resume",
}
OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {  # of the other commands
    "compress": {
        **dict.fromkeys(("o", "output", "output_dir"), "out"),
        **dict.fromkeys(("bits", "wbits", "q_bits"), "set.bits"),
        **dict.fromkeys(("group", "group_size", "q_group_size"), "set.group"),
        **{
            name: f"set.{name}" for name in ("grid", "damping", "sparsity", "ratio", "teacher", "steps", "lr")
        },
    },
    "export": {
        **dict.fromkeys(("o", "output", "outfile", "save_path", "mlx_path"), "path"),
        **dict.fromkeys(("outtype", "format", "f", "target"), "to"),
        **dict.fromkeys(("hf_path", "model"), "model"),
    },
    "chat": {"p": "prompt", "temp": "temperature", "max_new_tokens": "max_tokens", "n_predict": "max_tokens"},
}
DONE_ANYWAY: Final = ("train", "do_train")  # flags without a value, which our command means itself
VALUES: Final[Mapping[str, Mapping[str, str]]] = {
    "method": {"lora": "fedit", "qlora": "fedit", "fedavg": "fedit", "gptq": "optq", "distillation": "gkd"},
    "dtype": {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"},
    "to": {  # as llama.cpp's users know them
        **{kind: f"gguf:{kind}" for kind in ("q8_0", "f16", "bf16", "f32")},
        **dict.fromkeys(("fp16", "gguf:fp16"), "gguf:f16"),
        **dict.fromkeys(("fp32", "gguf:fp32"), "gguf:f32"),
        **dict.fromkeys(("safetensors", "huggingface", "transformers"), "hf"),
        "llama.cpp": "gguf",
        "vllm": "compressed-tensors",
    },
}
REMARKS: Final = {  # of a word of ours, where it is not quite the same
    "base=mapped": "the bits are those of the model's file: give a 4-bit GGUF file, or a built-in name (fleetune models)",
    "epochs": "a round is one pass over the rows of each client, for methods that count epochs",
    "steps": "rounds times steps, of each client",
}
GRIDS: Final = {  # types of llama.cpp that a compression makes: its setting
    **{f"q4_{end}": "bits=4" for end in "01"},
    **{f"q5_{end}": "bits=5" for end in "01"},
    **{f"q{bits}_k{end}": f"grid=q{bits}_k" for bits in range(2, 7) for end in ("", "_s", "_m", "_l")},
    **{name: f"grid={name}" for name in ("iq4_nl", "iq4_xs")},
}
TOPICS: Final = {  # of `fleetune help`: the page that is meant
    **dict.fromkeys(("errors", "error", "exit-codes", "problems"), "troubleshooting"),
    **dict.fromkeys(("start", "quickstart", "tutorial"), "your-own-data"),
    **dict.fromkeys(("phone", "android"), "to-a-phone"),
    **dict.fromkeys(("lr", "rate"), "learning-rate"),
    **dict.fromkeys(("compress", "quantize", "quantization"), "compression"),
    **dict.fromkeys(("python", "notebook"), "api"),
    "chat": "serve",
    "columns": "columns-with-other-names",
}


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
