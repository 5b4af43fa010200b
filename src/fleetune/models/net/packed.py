"""Run rows behind one another in one sequence, without padding.

Every layer of a decoder but attention works on tokens one by one.  Attention here takes each row's slice by itself, causal and
without a mask, and positions begin again with each row.  Whether a net is such a decoder is tried once: two short rows must give
what they give side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleetune.models.net.layers import head_of

NAME: Final = "fleetune_packed"
TRIED: Final = (5, 3)  # tokens of the rows of a trial
ERROR: Final = 4  # largest relative difference (2-norms) of a trial's logits, in units of the dtype's epsilon
_can: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# by a net's configuration: where the rows of the sequence that ran last begin and end; backward may run layers again
_rows: dict[int, list[tuple[int, int]]] = {}


@contextmanager
def packing(net: Any, wanted: bool = True) -> Iterator[int]:
    """Let a net take packed rows while the block runs; yield the most tokens that such a row may have, 0 for none."""
    most = _longest(net) if wanted else 0
    if not most:
        yield 0
        return
    net.set_attn_implementation(NAME)
    _rows[id(net.config)] = []
    try:
        if net not in _can:
            _can[net] = net.config._attn_implementation == NAME and _tried(net)
        yield most if _can[net] else 0
    finally:
        del _rows[id(net.config)]
        net.set_attn_implementation("sdpa")


def positions(net: Any, lengths: Sequence[int]) -> Tensor | None:
    """Return the positions [1, T] of rows of these lengths behind one another, None for a padded batch.  The net runs next."""
    if (rows := _rows.get(id(net.config))) is not None:
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        rows[:] = pairwise(ends)
    return torch.cat([torch.arange(n, device=net.device) for n in lengths])[None] if lengths else None


def _longest(net: Any) -> int:
    """Return how long a row may be in which each token sees all before it."""
    config = net.config
    if getattr(config, "_attn_implementation", "") != "sdpa" or head_of(net):
        return 0
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((n for n in windows if n), default=1 << 30)


def _tried(net: Any) -> bool:
    """Return whether two rows give the same logits behind one another as side by side."""
    device, (long, short) = net.device, TRIED
    ids = torch.arange(2 * long, device=device).reshape(2, long) % net.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            beside = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask == 1]
            at = positions(net, TRIED)
            behind = net(input_ids=ids[mask == 1][None], position_ids=at, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError):  # a net that takes no positions, or asks for a mask
        return False
    finally:
        positions(net, ())
        net.train(training)
    apart = (behind.float() - beside.float()).norm() / beside.float().norm()
    return float(apart) <= ERROR * torch.finfo(net.dtype).eps


def _mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    if _rows.get(id(config)):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, config=config, **kwargs)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
    inner, rows = ALL_ATTENTION_FUNCTIONS["sdpa"], _rows.get(id(getattr(module, "config", None)))
    if not rows:
        return inner(module, q, k, v, mask, **options)
    slices = [slice(*row) for row in rows]
    parts = [inner(module, q[:, :, at], k[:, :, at], v[:, :, at], None, **options)[0] for at in slices]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
