# SPDX-License-Identifier: Apache-2.0
"""Plan before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import subject as subjects
from fleetune.api import plain_models
from fleetune.errors import UsageError
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fleetune.planning.plan import Plan
    from fleetune.subject import Compressed


def plan(
    model: str | Path,
    *,
    ram: str | int | None = None,
    uplink: str | float | None = None,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 200,
    dtype: str | None = None,
    base: str | None = None,
    train: str = "weights",
    out: str | Path = "runs",
    offline: bool = False,
) -> Plan:
    """Return memory, traffic and time of every method for one device and one round, before any work.

    `ram` is the device's memory (4GB, or bytes), `uplink` its upload speed (1Mbps, or bytes a second); without them
    the plan does not say what fits, or how long sending takes.  A round is `steps` local steps of `batch` rows (None: 8) of
    `length` tokens (None: 512), with weights in `dtype` (None: fp32), in
    memory or mapped (`base`, None: memory).  With `train` scales the methods are those that tune the scales of a GGUF
    file (the base is mapped), and the model may be a compressed one, of which no file is written; ModelError for a model
    that has none.

    `Plan.settings` finds the method to begin with and what makes it fit `ram`: a `batch`, `length` or `dtype` that is None
    may become smaller and a `base` mapped, one that is given stays.  `Settings.options` are the arguments for `tune`:

        fleetune.tune(model, data, **fleetune.plan(model, ram="2GB").settings().options())
    """
    from fleetune.planning import plan as planning

    name = str(model) if isinstance(model, str | Path) else subjects.open(model).argument
    if train not in (known := recipes.choices("train")):
        raise UsageError(f"train = {train!r} is none of {', '.join(known)}")
    if train == "scales":
        if base == "memory":
            raise UsageError(f"train = {train} reads the base from its GGUF file", hint="--base mapped")
        base = "mapped"
    given = {"batch": batch, "length": length, "dtype": dtype, "base": base}
    asked: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    planning.Workload(steps=steps, **asked)  # bad numbers are refused before transformers is imported
    memory = planning.parse_bytes(f"{ram} B" if isinstance(ram, int) else ram)
    speed = planning.parse_rate(f"{uplink} B/s" if isinstance(uplink, int | float) else uplink)
    plain_models.check(name, Path(out), train)
    found = plain_models.compressed_of(name, train, Path(out))
    config, kinds = _parts(name, found, train, offline=offline)
    return planning.make(config, name, asked, steps=steps, ram=memory, uplink=speed, train=train, kinds=kinds)


def _parts(
    name: str, found: Compressed | None, train: str, *, offline: bool
) -> tuple[PretrainedConfig, Mapping[str, str]]:
    """Return a model's configuration, and the types of its matrices in its file, by layer; {} where that is not known.

    `found` is the compressed model that the name means.
    """
    from fleetune import models

    if found is not None:
        from fleetune.deploy import tunable_file

        kinds = tunable_file.kinds_of(found)
        return models.load_config(str(found.model), offline=offline), kinds
    config = models.load_config(name, offline=offline)
    if train != "scales":
        return config, {}
    from fleetune.planning import choose

    return config, choose.checked_kinds(name)
