"""Two-point steps in many spaces, one process.

usage: python spaces.py MODEL EVERY CONFIG..   CONFIG = space:lr:eps:steps:seed   PUBLIC=FILE has the public rows
spaces: full lin norm emb | sbr-R sbp-R | ffa-R (A = +-1/sqrt(R in)) ffap-R (A = top right singular vectors of public rows' gradient, /sqrt(R))"""

import os, sys, math, json, time
import numpy as np, torch
from torch import nn
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe.recipe import make
from fleetune.data import Batches
from fleetune.evaluation.losses import all_row_losses, pad_id, batch_loss
from fleetune.evaluation.objectives import loss_tensor

torch.set_num_threads(1)
MODEL = sys.argv[1]
EVERY = int(sys.argv[2])
T0 = time.time()
BS = 4
d = dict(
    model=MODEL,
    data="demo",
    partition="column:client",
    held_out=32,
    max_length=128,
    samples=0,
    client_rows=0,
    method="fedit",
    rounds=3,
    participation=0.167,
    set={"r": 8, "alpha": 16, "dropout": 0.0, "lr": 2e-3, "batch_size": 2, "epochs": 1},
)
job = prepare.prepare(make(d), offline=True)
model = job.model
net = model.net
net.eval()
for p in net.parameters():
    p.requires_grad_(False)
pad = pad_id(model)
rows = [r for c in job.rows for r in c]
held = job.held


def evaluate():
    s, c = all_row_losses(model, held, 8)[:2]
    return float(np.sum(s) / np.sum(c))


lin = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
PAR = dict(net.named_parameters())
base = {n: p.clone() for n, p in PAR.items()}
WL = {n + ".weight" for n in lin}
print(
    "params",
    {
        k: sum(p.numel() for n, p in PAR.items() if f(n, p))
        for k, f in dict(
            full=lambda n, p: 1,
            lin=lambda n, p: n in WL,
            norm=lambda n, p: p.dim() == 1,
            emb=lambda n, p: p.dim() > 1 and n not in WL,
        ).items()
    },
    "rows",
    len(rows),
    len(held),
    next(iter(PAR.values())).dtype,
    flush=True,
)
_acc = {}
_pub = []
_start = {}


def trained_on_public():
    if not _start:
        public()
        L = [BASE]
        for m in lin.values():
            m.weight.requires_grad_(True)
        W = [m.weight for m in lin.values()]
        opt = torch.optim.AdamW(W, lr=float(os.environ.get("PUBLR", "1e-3")), weight_decay=0)
        for e in range(3):
            for b in Batches(_pub[0], pad, 1 + e).steps(len(_pub[0]) // 4, 4):
                loss_tensor(model, b).backward()
                opt.step()
                opt.zero_grad()
            with torch.no_grad():
                L.append(evaluate())
            if L[-1] == min(L):
                _start.update({n: p.detach().clone() for n, p in PAR.items()})
        for m in lin.values():
            m.weight.requires_grad_(False)
        print("server alone on public rows, per epoch", [round(x, 4) for x in L], flush=True)
    return _start


def public():
    if _acc:
        return _acc
    d2 = dict(d)
    d2.update(data=os.environ["PUBLIC"], partition="iid", clients=4, limit=40, held_out=4, participation=1.0)
    j2 = prepare.prepare(make(d2), offline=True)
    mine = {tuple(np.asarray(r.ids).tolist()) if hasattr(r, "ids") else repr(r) for r in rows + list(held)}
    pr = [r for c in j2.rows for r in c]
    pub = [r for r in pr if (tuple(np.asarray(r.ids).tolist()) if hasattr(r, "ids") else repr(r)) not in mine]
    _pub.append(pub)
    print("public rows", len(pr), "not in train/held", len(pub), flush=True)
    assert pub
    for m in lin.values():
        m.weight.requires_grad_(True)
    for b in Batches(pub, pad, 1).steps(max(1, len(pub) // 4), 4):
        loss_tensor(model, b).backward()
        for n, m in lin.items():
            _acc[n] = _acc.get(n, 0) + m.weight.grad
            m.weight.grad = None
    for m in lin.values():
        m.weight.requires_grad_(False)
    return _acc


def space_of(space):
    kind, *o = space.split("-")
    rk = int(o[0]) if o else 0
    P = {}
    hs = []
    if kind in ("full", "lin", "norm", "emb"):
        f = dict(
            full=lambda n, p: True,
            lin=lambda n, p: n in WL,
            norm=lambda n, p: p.dim() == 1,
            emb=lambda n, p: p.dim() > 1 and n not in WL,
        )[kind]
        return {n: p for n, p in PAR.items() if f(n, p)}, hs
    g = torch.Generator().manual_seed(42)
    acc = public() if kind in ("sbp", "ffap") else None
    for n, m in lin.items():
        oo, ii = m.weight.shape
        Bq = None
        if acc is not None:
            torch.manual_seed(5)
            U, S, V = torch.svd_lowrank(acc[n].float(), q=min(rk + 8, oo, ii), niter=4)
        if kind == "sbp":
            Bq, Aq = U[:, :rk].contiguous(), V[:, :rk].T.contiguous()
        elif kind == "sbr":
            Bq = torch.linalg.qr(torch.randn(oo, rk, generator=g))[0]
            Aq = torch.linalg.qr(torch.randn(ii, rk, generator=g))[0].T.contiguous()
        elif kind == "ffa":
            Aq = (torch.randint(0, 2, (rk, ii), generator=g).float() * 2 - 1) / math.sqrt(rk * ii)
        elif kind == "ffap":
            Aq = V[:, :rk].T.contiguous() / math.sqrt(rk)
        P[n] = torch.zeros(rk if Bq is not None else oo, rk)

        def hook(mod, inp, out, n=n, Bq=Bq, Aq=Aq):
            h = (inp[0] @ Aq.T) @ P[n].T
            return out + (h @ Bq.T if Bq is not None else h)

        hs.append(m.register_forward_hook(hook))
    return P, hs


BASE = evaluate()
for cfg in sys.argv[3:]:
    space, lr, eps, steps, seed = cfg.split(":")
    lr, eps, steps, seed = float(lr), float(eps), int(steps), int(seed)
    with torch.no_grad():
        for n, p in PAR.items():
            p.copy_(base[n])
    full = space
    if space.startswith("pub+"):
        space = space[4:]
        public()
        st = trained_on_public()
        with torch.no_grad():
            for n, p in PAR.items():
                p.copy_(st[n])
    P, hs = space_of(space)
    first = evaluate() if full != space else BASE
    N = sum(p.numel() for p in P.values())
    t0 = time.process_time()
    L = [first]
    gs = []
    Z = {}

    def signs(s):
        if "stories260K" in MODEL:
            gg = torch.Generator().manual_seed(s)
            return [torch.randint(0, 2, p.shape, generator=gg, dtype=torch.int8) for p in P.values()]
        rg = np.random.Generator(np.random.SFC64(s))
        bits = [np.frombuffer(rg.bytes(-(-p.numel() // 8)), np.uint8) for p in P.values()]
        bits = [np.unpackbits(x, count=p.numel()) for x, p in zip(bits, P.values())]
        return [torch.from_numpy(x.view(np.int8)).reshape(p.shape) for x, p in zip(bits, P.values())]

    def move(s, scale):
        if s not in Z:
            Z.clear()
            Z[s] = signs(s)
        for p, z in zip(P.values(), Z[s]):
            p.add_(z.to(p.dtype).mul_(2).sub_(1), alpha=scale)

    with torch.no_grad():
        for t, b in enumerate(Batches(rows, pad, 77 + seed).steps(steps, BS)):
            s = seed * 100003 + t
            move(s, eps)
            lp = batch_loss(model, b)
            move(s, -2 * eps)
            lm = batch_loss(model, b)
            gr = (lp - lm) / (2 * eps)
            gs.append(gr)
            if not math.isfinite(gr):
                L.append(float("nan"))
                break
            move(s, eps - lr * gr)
            if (t + 1) % EVERY == 0:
                L.append(evaluate())
                if not L[-1] < BASE + 0.3:
                    break
    for h in hs:
        h.remove()
    print(
        "RESULT",
        json.dumps(
            dict(
                space=full,
                lr=lr,
                eps=eps,
                dims=N,
                steps=steps,
                seed=seed,
                g=round(float(np.mean(np.abs(gs[-50:]))), 2),
                cpu=round(time.process_time() - t0, 1),
                loss=[round(x, 4) for x in L],
            )
        ),
        flush=True,
    )
