"""Make one file of `benchmarks.rivals` in the environment of a rival, which need not hold Fleetune.

What is left in the folder `made` is a GGUF file, or the values of the layers where a rival writes another format.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Places = dict[str, str]  # dense: a folder; f32: the same as a GGUF file; windows; importance; made: a folder


def ours(places: Places, **settings: Any) -> None:
    fleetune, out = importlib.import_module("fleetune"), places["made"]
    done = fleetune.compress(places["dense"], out=f"{out}/runs", offline=True, progress=False, **settings)
    fleetune.export(done, path=f"{out}/model.gguf", progress=False)


def importance(places: Places) -> None:
    """Keep the mean square of each input of each layer on the windows, by the name of the tensor in a GGUF file."""
    gguf, found = importlib.import_module("gguf"), dict[str, torch.Tensor]()
    net, _, rows = _dense(places)
    family = net.config.model_type.removesuffix("_text")  # of Gemma 3
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, net.config.num_hidden_layers)

    def hear(module: Any, args: Any, name: str) -> None:
        found[name] = found.get(name, 0) + args[0].square().mean((0, 1)) / len(rows)

    for name, module in net.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            key = f"{names.get_name(name)}.weight"
            module.register_forward_pre_hook(lambda module, args, key=key: hear(module, args, key))
    with torch.inference_mode():
        for row in rows:
            net.model(**row)
    save_file(found, places["importance"])


def llama_cpp(places: Places, kind: int, embedding: int | None = None) -> None:
    """Run llama.cpp's quantiser; the numbers are its types of a file and of a tensor (--token-embedding-type)."""
    bindings = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    settings = library.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, kind
    if embedding is not None:
        settings.token_embedding_type = embedding
    # struct llama_model_imatrix_data { const char * name; const float * data; size_t size; }, ended by a null name
    kept = [
        (ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", x.numpy()), len(x))
        for name, x in load_file(places["importance"]).items()
    ]
    table = ffi.new("uintptr_t[]", 3 * (len(kept) + 1))
    for i, (name, data, size) in enumerate(kept):
        table[3 * i : 3 * i + 3] = [int(ffi.cast("uintptr_t", name)), int(ffi.cast("uintptr_t", data)), size]
    settings.imatrix = ffi.cast("struct llama_model_imatrix_data *", table)
    files = (places["f32"].encode(), f"{places['made']}/model.gguf".encode())
    if library.llama_model_quantize(*files, ffi.addressof(settings)):
        raise RuntimeError("llama.cpp wrote no file")


def auto_round(places: Places, export: str = "", **settings: Any) -> None:
    net, tokenizer, rows = _dense(places)
    sizes = {"dataset": rows, "nsamples": len(rows), "seqlen": rows[0]["input_ids"].shape[1]}
    tuned = importlib.import_module("auto_round").AutoRound(
        net, tokenizer, device_map="cpu", enable_torch_compile=False, **sizes, **settings
    )
    if export:
        tuned.quantize_and_save(places["made"], format=export)
        next(Path(places["made"]).rglob("*.gguf")).rename(f"{places['made']}/model.gguf")
    else:
        _keep(places, tuned.quantize()[0])


def llm_compressor(places: Places, method: str, **weights: Any) -> None:
    """Run llm-compressor: GPTQ, or AWQ and rounding."""
    package = importlib.import_module("llmcompressor.modifiers.quantization")
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "strategy": "group", **weights}}}
    recipe = (
        [importlib.import_module("llmcompressor.modifiers.transform").AWQModifier()]
        if method == "AWQ"
        else []
    )
    made = package.QuantizationModifier if method == "AWQ" else package.GPTQModifier
    net, tokenizer, rows = _dense(places)
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign,assignment,misc]  # AWQ pins without a GPU, too
    importlib.import_module("llmcompressor").oneshot(
        model=net,
        tokenizer=tokenizer,
        dataset=importlib.import_module("datasets").Dataset.from_list(
            [{k: v[0].tolist() for k, v in row.items()} for row in rows]
        ),
        recipe=[*recipe, made(config_groups=groups, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=rows[0]["input_ids"].shape[1],
    )
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    for module in net.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            module.weight.data = forward.forward_quantize(
                module, module.weight.data, "weight", scheme.weights
            )
    _keep(places, net)


def gptqmodel(places: Places, **settings: Any) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer than 4 cores give it 1, which it refuses
    package, packed = importlib.import_module("gptqmodel"), f"{places['made']}/packed"
    model = package.GPTQModel.load(places["dense"], package.QuantizeConfig(**settings, device="cpu"))
    model.quantize(_dense(places)[2], batch_size=1)
    model.save(packed)
    read = package.GPTQModel.load(packed, device="cpu", backend=package.BACKEND.TORCH).model
    found = {n: m.dequantize_weight().T for n, m in read.named_modules() if hasattr(m, "dequantize_weight")}
    save_file(
        {f"{n}.weight": x.float().contiguous() for n, x in found.items()},
        f"{places['made']}/values.safetensors",
    )


def _dense(places: Places) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    package = importlib.import_module("transformers")
    windows = torch.tensor(json.loads(Path(places["windows"]).read_text()))
    rows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
    net = package.AutoModelForCausalLM.from_pretrained(places["dense"], dtype=torch.float32)
    return net.eval(), package.AutoTokenizer.from_pretrained(places["dense"]), rows


def _keep(places: Places, net: Any) -> None:
    found = {n: p for n, p in net.state_dict().items() if n.endswith(("_proj.weight", "norm.weight"))}
    save_file({n: p.float().contiguous() for n, p in found.items()}, f"{places['made']}/values.safetensors")


def main(kind: str, places: Places, settings: dict[str, Any]) -> None:
    """Make the file; the peak of memory is left beside it."""
    torch.set_num_threads(1)
    globals()[kind](places, **settings)
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    Path(places["made"], "peak.txt").write_text(peak)
