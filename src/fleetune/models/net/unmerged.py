# SPDX-License-Identifier: Apache-2.0
"""Refuse to copy or save a net whose tuning is not in its stored weights, and say which call does it.

The net of a tuned model runs on its base's weights with a ledger's view or an adapter attached.  `state_dict`,
`save_pretrained`, `copy.deepcopy` and `torch.save` would give the base, or pieces that nothing else reads.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from torch import nn

from fleetune.errors import ModelError

HINT: Final = (
    "model.save(FOLDER) writes the tuned model; model.merge() puts the tuning into the weights, for good, and then "
    "every way works"
)
HOOK: Final = "_fleetune_unmerged"
CALLS: Final = {
    "save_pretrained": "save_pretrained",
    "__deepcopy__": "copy.deepcopy",
    "__reduce_ex__": "torch.save",
}


def guard(net: nn.Module) -> None:
    """Let the net and all modules of it refuse these calls until `free`."""

    def before(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        _refuse("state_dict")

    for module in net.modules():
        free(module)
        register: Any = module.register_state_dict_pre_hook  # torch leaves it untyped
        module.__dict__[HOOK] = register(before)
        calls = {n: call for n, call in CALLS.items() if n != "save_pretrained" or hasattr(module, n)}
        module.__dict__.update({name: _refusal(call) for name, call in calls.items()})


def free(module: nn.Module) -> None:
    """Take the refusals off a module and all within it; does nothing where there are none."""
    for inside in module.modules():
        if (hook := inside.__dict__.pop(HOOK, None)) is not None:
            hook.remove()
            for name in CALLS:
                inside.__dict__.pop(name, None)


def _refusal(call: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(call)

    return refuse


def _refuse(call: str) -> NoReturn:
    raise ModelError(f"{call} would lose the tuning, which is not in the stored weights", hint=HINT)
