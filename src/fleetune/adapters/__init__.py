"""Attach small trainable modules to a frozen model (PEFT methods), train, save and remove them.

There is one file for each kind of module; what they share is in `attachment.py`.  PEFT is imported in this package alone.
"""

from fleetune.adapters.attachment import (
    MOST_TOKENS,
    AdapterSpec,
    attach,
    attachment_of,
    check_form,
    detach,
    digest,
    export,
    load_,
    merge,
    trainable,
    training,
)
from fleetune.adapters.bitfit import Bitfit, Full
from fleetune.adapters.bottleneck import Bottleneck
from fleetune.adapters.folder import MOST_JSON, load, save
from fleetune.adapters.lora import (
    ALL_LINEAR,
    INITS,
    QUERY_VALUE,
    VARIANTS,
    Lora,
    LoraPart,
    pairs,
    set_start_factors,
    start_factors,
)
from fleetune.adapters.prefix import Prefix
from fleetune.adapters.prompt import Prompt
from fleetune.adapters.scales import Scales, moved_scales

__all__ = [
    "ALL_LINEAR",
    "INITS",
    "MOST_JSON",
    "MOST_TOKENS",
    "QUERY_VALUE",
    "VARIANTS",
    "AdapterSpec",
    "Bitfit",
    "Bottleneck",
    "Full",
    "Lora",
    "LoraPart",
    "Prefix",
    "Prompt",
    "Scales",
    "attach",
    "attachment_of",
    "check_form",
    "detach",
    "digest",
    "export",
    "load",
    "load_",
    "merge",
    "moved_scales",
    "pairs",
    "save",
    "set_start_factors",
    "start_factors",
    "trainable",
    "training",
]
