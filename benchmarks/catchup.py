"""FedKSeed's catch-up: the global model from the base and K accumulated scalars.

The papers' way is K passes; some are measured and the rest extrapolated (a pass costs the same whatever its
seed).  Ours with independent +1/-1 directions is one pass over the weights in which every tile meets all K
directions while it is in the cache; with a pool it is one pass with one direction, whatever K is.
Ours include making the passes from the entries, and give every rebuilt tensor once, in name order, as a
digest or an export takes them.
"""

import numpy as np

from benchmarks import papers, shape
from benchmarks.harness import Result, Setting, Timing, clock, compare, measure
from fleetune.models import Model, named_tensors
from fleetune.seeds.noise import passes
from fleetune.seeds.view import View

LR = 3e-7
SEEDS = 6  # measured, of K


def run(setting: Setting) -> Result:
    """Catch-up at K = 1024 and 4096."""
    result, model = Result(), shape.model(setting.quick)
    pools = (64, 256) if setting.quick else (1024, 4096)
    one, pool, independent = _papers(setting, model), _pool(setting, model, (16, *pools)), {}
    for K in pools:
        independent[K] = _independent(setting, model, K, 3 if min(pools) == K else 1)
    result.keep("papers, one seed", {"update": one})
    result.keep("pool", {str(K): t for K, t in pool.items()})
    result.keep("independent", {str(K): t for K, t in independent.items()})
    note = f"the papers' K passes are extrapolated from {len(one.wall)} that were measured"
    for K in pools:
        target = (80.0, 2000.0) if K == 1024 and not setting.quick else (None, None)
        theirs = one.scaled(K)
        of = f"FedKSeed catch-up, K = {K}"
        result.rows += [
            compare(f"{of}: independent directions", independent[K], theirs, "gain", target[0], note),
            compare(f"{of}: a pool of directions", pool[K], theirs, "gain", target[1], note),
        ]
    result.rows.append(
        compare(f"Catch-up of a pool: K = {max(pools)} against 16", pool[max(pools)], pool[16], "cost", 1.2)
    )
    return result


def _papers(setting: Setting, model: Model) -> Timing:
    named, rng = list(model.net.named_parameters()), np.random.default_rng(42)
    kept = [p.data for _, p in named]  # the passes write out of place, so this is the base
    seeds = rng.integers(1, 10**11, setting.repeats(SEEDS) + 1).tolist()
    taken = [clock(lambda s=s: papers.update(named, s, 50.0, LR)) for s in seeds][1:]
    for (_, p), base in zip(named, kept, strict=True):
        p.data = base
    return Timing([w for w, _ in taken], [c for _, c in taken])


def _rebuild(view: View, K: int) -> None:
    ids, moves = np.arange(K, dtype=np.uint64), np.random.default_rng(1).integers(1, 2000, K)
    view.place(passes(view.law, K if view.law == "hashed" else 1, ids, moves))
    for _name, _tensor in view.tensors():
        pass


def _pool(setting: Setting, model: Model, pools: tuple[int, ...]) -> dict[int, Timing]:
    view = View(named_tensors(model.net), model.net, run_key=1, law="hashed", grid=LR / 256)
    times = measure({str(K): lambda K=K: _rebuild(view, K) for K in pools}, setting.repeats(7))
    view.remove()
    return {int(K): t for K, t in times.items()}


def _independent(setting: Setting, model: Model, K: int, repeats: int) -> Timing:
    view = View(named_tensors(model.net), model.net, run_key=1, law="rademacher", grid=LR / 256)
    _rebuild(view, 4)  # compiles
    taken = [clock(lambda: _rebuild(view, K)) for _ in range(setting.repeats(repeats))]
    view.remove()
    return Timing([w for w, _ in taken], [c for _, c in taken])
