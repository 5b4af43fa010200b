# SPDX-License-Identifier: Apache-2.0
"""FedPepTAO's choice of layers: how many travel by each rule, and the time, by rows and Hessian products.

    python -m benchmarks.curvature MODEL ROWS [--seeds N]

For every seed one device of 16 rows trains its first round with the method's defaults.  Then the curvature of its loss is
measured on 8 rows and on 2, with up to 50 products; fewer are the first of these.  Times are of the processor, one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from fleetune import adapters
from fleetune.data.encode import Batches
from fleetune.evaluation.losses import pad_id
from fleetune.models.layers import layers_of
from fleetune.seeds.noise import derive
from fleetune.tuning import prepare
from fleetune.tuning import recipe as recipes
from fleetune.tuning.methods import _adapter, _layers

PRODUCTS = (5, 10, 20, 50)
ROWS = (8, 2)


def measure(model: str, data: str, seed: int) -> tuple[float, dict[tuple[int, int], Any]]:
    """Seconds of a device's training; and by (rows, products) the layers by two rules and seconds of the Lipschitz rule."""
    options = {"model": model, "data": data, "method": "fedpeptao", "clients": 1, "seed": seed, "limit": 18}
    job = prepare.prepare(
        recipes.make(options | {"held_out": 2, "samples": 0, "max_length": 64}), offline=True
    )
    net, method, rows = job.model, job.method, job.rows[0]
    key = derive(seed, "local", 1, 0)
    state = method.init(net, derive(seed, "init"))
    batches = Batches(rows, pad_id(net), key, net.device, 0)
    began = time.process_time()
    _adapter.train(net, batches, key, method.training(), {})  # type: ignore[attr-defined]
    trained, here = time.process_time() - began, adapters.export(net)
    found = {}
    for count in ROWS:
        adapters.load_(net, here)
        batch = next(batches.repeat_batch(0, count, 1))
        began = time.process_time()
        with _layers.eager(net.net), torch.enable_grad():
            Q, HQ = _layers.subspace(_layers.products(net, batch), _layers._start(net, key), max(PRODUCTS))
            adapters.load_(net, state.tensors)
            there = _layers.products(net, batch)
            moved = np.stack([there(q) for q in Q.T], axis=1)
        spent, total = time.process_time() - began, len(layers_of(net.net))
        for q in PRODUCTS:
            spectrum = _layers.ritz(Q[:, :q], HQ[:, :q])
            L = float(np.linalg.norm(HQ[:, :q] - moved[:, :q], 2))
            shares = _layers.share_by_gap(spectrum, L), _layers.share_by_plateau(spectrum)
            found[count, q] = (*(_layers.count(s, total) for s in shares), spent * q / max(PRODUCTS))
    return trained, found


def main() -> None:
    """Print a line for each number of rows and products."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measure(args.model, args.data, seed) for seed in range(1, args.seeds + 1)]
    print(f"training of a device: {np.mean([trained for trained, _ in runs]):.2f} s")
    print("rows  products  lipschitz            plateau              seconds  of training")
    for case in runs[0][1]:
        lipschitz, plateau, spent = zip(*(found[case] for _, found in runs), strict=True)
        share = sum(spent) / sum(trained for trained, _ in runs)
        print(f"{case[0]:4}  {case[1]:8}  {lipschitz!s:20} {plateau!s:20} {np.mean(spent):7.2f}  {share:.1f}")


if __name__ == "__main__":
    main()
