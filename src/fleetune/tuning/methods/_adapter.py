"""Train a module on a device with AdamW, with fresh moments every round, and step on the server along the devices' mean.

`Trained` is what every method that trains on devices does there; `Averaged` is a method that averages one module.  Two options
keep devices with unlike data together:

- FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): the loss has mu/2 |w - w_global|^2 added.
- SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II): every step also moves by -eta (c - c_k), where
  c_k is the mean of the device's own steps last time, and c the mean of all devices.  Here the steps are AdamW's and are
  corrected afterwards, as in OpenFedLLM.  Nothing more goes up: c_k' - c_k = (w - w_k) / (tau eta) - c, all of which the server
  has.  c is the mean over the devices seen so far (the paper: a device that never took part counts as zero).  A device does not
  learn whether its reply arrived, so after a lost one its c_k has moved and c has not.

With `wire=sign`, changes travel as signs with scales (`exchange/messages.py`).  A device sends one plane of its change.  The
server writes the mean as `PLANES` planes, and adds what they leave to the next mean (error feedback: Karimireddy et al. 2019,
arXiv 1901.09847, Algorithm 1).  A device that remembers the module is sent the planes of the rounds since; any other draws the
start from the seed and is sent all planes, or the module where that is less.  So all have one module, the server's, to the bit.
"""

import math
import secrets
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from fleetune import adapters
from fleetune.adapters.lora_init import FROM_WEIGHTS, explained_directions, gradient_directions
from fleetune.common.settings import setting
from fleetune.data import Batch, Batches, collate, encode_rows, read
from fleetune.errors import DataError, MessageError
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model
from fleetune.privacy.mechanism import Privacy, PrivateSum
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.aggregation import MEAN, PRIVATE, Rule, Tensors
from fleetune.tuning.exchange.footprint import WIDE, Footprint, Module, placeholders
from fleetune.tuning.exchange.messages import Layout, Payload, ReplySpec, Signs, add_signs, signs_of

CHECKPOINTING: Final = ("auto", "true", "false")  # auto: by the device's memory
NOBODY: Final = np.zeros(0, np.int64)
NOTHING: Final[Tensors] = {}  # never written to: a state is replaced
PLANES: Final = 2  # of signs down; up goes one
NO_SIGNS: Final = Signs(np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.float32))
# starts of LoRA that each machine draws to the same bits
SAME_EVERYWHERE: Final = ("default", "gaussian", "shared")


class State(NamedTuple):
    """The global module, how it was started, and what the server's rule and SCAFFOLD remember."""

    tensors: Tensors  # float32, by parameter name
    seed: int
    cut: float = 0.0  # share of the squared norm that the last product average had to leave out
    moments: Tensors = NOTHING
    c: Tensors = NOTHING
    seen: np.ndarray = NOBODY  # devices that c is the mean of
    start: Tensors = NOTHING  # a LoRA's factors that are subtracted (B0, A0), or stay and no seed draws
    # wire=sign
    round: int = 0
    bits: np.ndarray = NO_SIGNS.bits  # what the last rounds changed, as `Signs`: `PLANES` each
    scales: np.ndarray = NO_SIGNS.scales
    left: np.ndarray = np.zeros(1, np.float32)  # of the mean, what was not sent yet


class Trained(methods.Method):
    """A method whose devices train a module with AdamW; its settings are fields of the method, or stand here."""

    lr: float
    epochs: int
    steps: int  # instead of epochs, unless 0
    batch_size: int
    weight_decay: float
    clip: float  # of the gradient's norm; 0: not
    checkpointing: str  # one of `CHECKPOINTING`
    decay: bool = True  # linear to 0 within the round, after them
    mu: float = 0.0  # FedProx
    scaffold: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 1 or self.steps < 0 or self.rising < 0:
            raise ValueError("batch_size and epochs must be at least 1, steps and warmup 0 or more")
        if not 0 < self.own_lr < math.inf:
            raise ValueError(f"lr = {self.lr} must be positive")
        if not all(0 <= x < math.inf for x in (self.clip, self.weight_decay, self.mu)):
            raise ValueError(
                f"clip = {self.clip}, weight_decay = {self.weight_decay}, mu = {self.mu}: each must be 0 or a positive number"
            )
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing {self.checkpointing!r} is not one of {', '.join(CHECKPOINTING)}")

    @property
    def own_lr(self) -> float:
        """The learning rate, where `lr` 0 may stand for a rate of the method's own."""
        return self.lr

    @property
    def rising(self) -> int:
        """The steps at the beginning of a round in which the rate rises."""
        return 0

    @property
    def recomputes(self) -> bool:
        """Whether activations may be computed twice."""
        return self.checkpointing != "false"

    def local_steps(self, rows: int) -> int:
        return self.steps or self.epochs * -(-rows // self.batch_size)

    def rates(self, n: int) -> list[float]:
        """Return the learning rate of every step of a device with n rows.

        It rises for so many steps w, from lr / (w + 1) on, and may fall linearly afterwards.
        """
        count, warm, lr = self.local_steps(n), self.rising, self.own_lr
        rising = [lr * (t + 1) / (warm + 1) for t in range(min(warm, count))]
        rest = count - len(rising)
        return rising + [lr * (1 - t / rest if self.decay else 1) for t in range(rest)]

    def walked(self, n: int) -> tuple[float, float]:
        """Return the sum of `rates(n)` and the root of the sum of their squares, without the list: n may be any claim."""
        w = min(self.rising, self.local_steps(n))
        rest = self.local_steps(n) - w
        length = w * (w + 1) / 2 / (self.rising + 1)
        squares = w * (w + 1) * (2 * w + 1) / 6 / (self.rising + 1) ** 2
        length += (rest + 1) / 2 if self.decay and rest else rest
        squares += (rest + 1) * (2 * rest + 1) / (6 * rest) if self.decay and rest else rest
        return self.own_lr * length, self.own_lr * math.sqrt(squares)

    def train(self, model: Model, batches: Batches, key: int, correction: Mapping[str, np.ndarray]) -> float:
        """Train the module, and return the mean loss of the steps; `correction` is SCAFFOLD's c - c_k by name, {} for none."""
        parameters = {n: p for n, p in adapters.trainable(model).items() if p.requires_grad}
        away = {n: torch.as_tensor(a).to(parameters[n]) for n, a in correction.items()}
        steps = AdamSteps(list(parameters.values()), self, model.device, whole=batches.private is not None)
        taken = batches.steps if self.steps else batches.epochs
        rooms = {"auto": model.room, "true": lambda: 0.0, "false": lambda: math.inf}
        room, losses = rooms[self.checkpointing], []
        with adapters.training(model, key), by_layer(model.net, room=room) as kept, steps.in_backward():
            for batch, rate in zip(
                taken(self.steps or self.epochs, self.batch_size), self.rates(batches.n), strict=True
            ):
                steps.rate = rate
                if batch.drawn is None:
                    loss = loss_tensor(model, batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.item())
                else:
                    hide_rows(model, batch, batch.drawn.privacy, parameters)
                    losses.append(0.0)
                steps.after_backward()
                with torch.no_grad():
                    for name, direction in away.items():
                        parameters[name].sub_(direction, alpha=rate)
        model.recomputes = kept.recomputed
        return float(np.mean(losses))

    def distance(self, state: Any, sent: Payload, reply: methods.Reply) -> float:
        """Return how far a device went: root mean square, over that of random steps of the learning rate's size.

        Such steps, and AdamW's are about that, go sqrt(sum of the steps' squared rates): with it, devices of few and of many
        rows compare.  A device of a lower rank was sent the first part of each tensor.
        """
        w_k, tensors = reply.payload.arrays, state.tensors
        moved = methods.norm(
            w_k[n].astype(np.float64) - t[tuple(map(slice, w_k[n].shape))] for n, t in tensors.items()
        )
        _, walk = self.walked(reply.payload.int("n"))
        return moved / (math.sqrt(sum(w_k[n].size for n in tensors)) * walk)

    def cannot_hide_rows(self) -> str:
        return "scaffold remembers what rows did; set scaffold=false" if self.scaffold else ""

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if rule.name == PRIVATE and self.scaffold:
            return "scaffold remembers a variate of every device, which no noise hides; set scaffold=false"
        if rule.name == "sign-vote":
            return (
                "signs do not say how far the numbers of a module go; use aggregation=median or trimmed-mean"
            )
        if self.scaffold and rule.name != "norm-clip":
            return f"what a {rule.name} leaves out adds up in scaffold's variates; use aggregation=norm-clip"
        return ""


@dataclass(frozen=True)
class Averaged(Trained):
    """A method that averages one module, with the settings that all of these have."""

    lr: float = setting(3e-4, "η", "AdamW learning rate", found=True)
    epochs: int = setting(1, "E", "local epochs a round", only_if="steps=0")
    batch_size: int = setting(8, "B", "rows a step")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    warmup: int = setting(0, "w", "steps at the beginning of a round in which the rate rises")
    weight_decay: float = setting(0.0, "λ", "AdamW weight decay")
    clip: float = setting(0.0, "C", "largest norm of a gradient (0: any)")
    targets: str = setting("all-linear", "W", "all-linear, query-value, or the layers' names")
    start: str = setting(
        "default",
        "A₀, B₀",
        "where A and B start: default, gaussian, shared, orthogonal, pissa, olora, eva, gradient",
    )
    start_data: str = setting(
        "demo", "X", "rows the server has, a file or demo (32 are read)", only_if="start=eva|gradient"
    )
    wire: str = setting("fp32", "wire", "fp32; sign: changes as signs, 1 bit a number up, 2 down")
    server: str = setting("avg", "server", "the server's rule: avg, avgm or adam")
    server_lr: float = setting(
        0.0, "η_s", "the server's learning rate (0: 1 for avg and avgm, 1e-3 for adam)"
    )
    mu: float = setting(0.0, "μ", "FedProx: pull towards the global module (0.01 is usual)")
    scaffold: bool = setting(False, "c_k", "SCAFFOLD: correct a device's drift (its c goes down too)")
    checkpointing: str = setting("auto", "ckpt", "activations twice: auto (short memory), true or false")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wire not in ("fp32", "sign"):
            raise ValueError(f"wire = {self.wire!r} is neither fp32 nor sign")
        if self.wire == "sign" and self.scaffold:
            raise ValueError("scaffold's variates are not sent as signs; use wire=fp32, or scaffold=false")
        aggregation.check_server(self.server, lr=self.server_lr)
        check_targets(self.targets)

    @property
    def rising(self) -> int:
        return self.warmup

    @abstractmethod
    def attach(self, model: Model, seed: int, start: str = "default") -> None:
        """Give `model` the module, unless it has it.  (A device is sent the start's numbers.)"""

    def init(self, model: Model, key: int) -> State:
        """Return the state of the module, rounded as every device will have it."""
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed, self.start)
        if self.start in FROM_ROWS:
            start_from_rows(model, self.start, self.start_data)
        tensors = adapters.export(model)
        none = no_signs(Layout.of(tensors)) if self.wire == "sign" else NO_SIGNS
        start = {} if self.start in SAME_EVERYWHERE else adapters.start_factors(model)
        return State(tensors, seed, start=start, bits=none.bits, scales=none.scales)

    def broadcast(self, state: State) -> Payload:
        """Send the module, the start's factors, and SCAFFOLD's c once there is one."""
        return self.news(state, 0, 0)

    def news(self, state: State, known: int, kind: int) -> Payload:
        """Send what changed since the module that a device was sent in round `known`; 0: since the start.

        With wire=sign the whole module is sent where that is less, or the start is no function of the seed, and as to a new
        device.  A device keeps the start's factors.
        """
        missed = PLANES * (state.round - max(known - 1, 0))
        whole = missed > len(state.bits) or not (known or self.start in SAME_EVERYWHERE)
        known = 0 if whole and self.wire == "sign" else known
        start = {} if known else prefixed(state.start, "start/")
        scalars = {"seed": state.seed} | ({"known": known} if state.start or self.wire == "sign" else {})
        if self.wire == "fp32":
            return Payload(rounded(state.tensors) | start | prefixed(rounded(state.c), "c/"), scalars)
        first = len(state.bits) - missed
        arrays = state.tensors if whole else {"bits": state.bits[first:], "scales": state.scales[first:]}
        arrays = arrays | start
        groups = Layout.of(state.tensors).groups.tobytes()
        return Payload(arrays, scalars | {"groups": groups})

    def expects(self, state: State) -> ReplySpec:
        if self.wire == "fp32":
            return ReplySpec({n: ("float32", t.shape) for n, t in state.tensors.items()})
        sizes = Layout.of(state.tensors).sizes
        return ReplySpec(
            {"bits": ("uint8", (1, -(-int(sizes.sum()) // 8))), "scales": ("float32", (1, len(sizes)))}
        )

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do epochs (or steps) of AdamW on the module, moments fresh every round."""
        self.attach(model, payload.int("seed"))
        return self.trained(model, payload, batches, key, memory)

    def trained(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Load what came, train, and return what goes back; the module is then what was sent.

        `payload` has no arrays afterwards: in training, the module's parameters are all that is left of them.
        """
        factors = group(payload.arrays, "start/") or group(memory, "start/")
        if payload.scalars.get("known") and not (factors or self.wire == "sign"):
            raise MessageError("this device does not remember the start's factors, which did not come")
        adapters.set_start_factors(model, factors)
        memory.update(prefixed(factors, "start/"))
        told = self.told(model, payload, memory) if self.wire == "sign" else {}
        arrays = told or payload.take()
        adapters.load_(model, group(arrays))
        if c := group(arrays, "c/"):
            adapters.check_form(model, c)
        if not self.scaffold and not told:
            arrays.clear()
        w, c_k = group(arrays), group(memory, "c/")
        correction = {n: np.asarray(c.get(n, 0.0) - c_k.get(n, 0.0)) for n in w} if c or c_k else {}
        loss = self.train(model, batches, key, correction)
        w_k = rounded(adapters.export(model))
        if told:
            layout = Layout.of(w)
            start = layout.flat(w)
            signs = signs_of(layout.flat(w_k).astype(np.float64) - start, layout.sizes)
            adapters.load_(model, layout.tensors(add_signs(start, signs, layout.sizes)))
            return Payload(signs._asdict(), {"n": batches.n, "loss": loss})
        if self.scaffold:
            variate = aggregation.client_variate(c_k, c, w, w_k, self.walked(batches.n)[0])
            if all(np.isfinite(v).all() for v in variate.values()):  # else the reply will be refused
                memory.update({f"c/{n}": v.astype(np.float32) for n, v in variate.items()})
        return Payload(w_k, {"n": batches.n, "loss": loss})

    def told(self, model: Model, payload: Payload, memory: dict[str, Any]) -> Tensors:
        """Return the module of a round of wire=sign, and remember it: what came, added to what the device has."""
        known, whole = payload.int("known"), "bits" not in payload.arrays
        if not (known or whole):  # the start
            adapters.detach(model)
            self.attach(model, payload.int("seed"), self.start)
        module = group(payload.arrays) if whole else adapters.export(model)
        layout = Layout.of(module)
        if layout.groups.tobytes() != payload.scalars.get("groups"):
            raise MessageError("the changes that came are not of this model's module")
        if not whole:
            if known and "module" not in memory:
                raise MessageError("this device does not remember the rounds before those that came")
            signs = Signs(payload.array("bits"), payload.array("scales"))
            form = no_signs(layout, len(np.atleast_1d(signs.scales)))
            if [(a.shape, a.dtype) for a in signs] != [(a.shape, a.dtype) for a in form]:
                raise MessageError("the changes that came are not as many as the module has numbers")
            start = memory["module"] if known else layout.flat(module)
            module = layout.tensors(add_signs(start, signs, layout.sizes))
        memory["module"] = Layout.of(module).flat(module)
        return module

    def begins(self, sent: Payload) -> Tensors:
        if self.wire == "sign":
            return {"change": np.zeros(int(sizes_sent(sent).sum()))}
        return group(sent.arrays)

    def moved(self, sent: Payload, reply: methods.Reply) -> Tensors:
        arrays = reply.payload.arrays
        if self.wire == "sign":
            none, sizes = self.begins(sent)["change"], sizes_sent(sent)
            return {"change": add_signs(none, Signs(arrays["bits"], arrays["scales"]), sizes)}
        return dict(arrays)

    def distance(self, state: State, sent: Payload, reply: methods.Reply) -> float:
        if self.wire == "fp32":
            return super().distance(state, sent, reply)
        (change,) = self.moved(sent, reply).values()
        return methods.norm([change]) / (math.sqrt(change.size) * self.walked(reply.payload.int("n"))[1])

    def aggregate(self, state: State, replies: Iterable[methods.Reply], rule: Rule = MEAN) -> State:
        """Take the mean weighted by rows, the server's step, and SCAFFOLD's c if it is on; no reply gives the state back.

        Another `rule` combines the modules in the mean's place, and the changes of the devices' variates.
        """
        sent = self.broadcast(state)
        w, c, seen = state.tensors, state.c, set(state.seen.tolist())
        zeros = {n: np.zeros(tensor.shape) for n, tensor in w.items()}
        before = {n: len(seen) * np.asarray(c.get(n, 0.0), np.float64) + zeros[n] for n in w}
        combined = rule.combining(self.begins(sent))
        variates = (rule if self.scaffold else MEAN).combining(sums=before)
        for reply in replies:
            n = reply.payload.int("n")
            combined.add(float(n), self.moved(sent, reply))
            if self.scaffold:
                walked, _ = self.walked(reply.rows or n)
                variate = aggregation.client_variate({}, c, w, reply.payload.arrays, walked)
                variates.add(1.0, variate)  # c_k' - c_k
                seen.add(reply.client)
        if not combined.total:
            return self.written(state, state) if self.wire == "sign" else state
        mean = combined.tensors()
        if self.wire == "sign":
            mean = {n: w[n] + change for n, change in Layout.of(w).tensors(mean["change"]).items()}
        else:
            mean = rounded(mean)
        new = state._replace(tensors=mean)
        if self.server != "avg" or self.server_lr not in (0.0, 1.0):  # else the mean itself
            delta = {n: m.astype(np.float64) - w[n].astype(np.float64) for n, m in mean.items()}
            moved, moments = aggregation.server_step(self.server, w, delta, state.moments, lr=self.server_lr)
            new = state._replace(tensors=rounded(moved), moments=moments)
        if self.wire == "sign":
            return self.written(state, new)
        if not self.scaffold:
            return new
        c = {n: total / len(seen) for n, total in variates.sums().items()}
        return new._replace(c=c, seen=np.array(sorted(seen), np.int64))

    def written(self, state: State, new: State) -> State:
        """Return `new` with its change from `state` as signs, and what these leave; nothing more is written without one."""
        layout = Layout.of(state.tensors)
        start = layout.flat(state.tensors)
        change = layout.flat(new.tensors).astype(np.float64) - start
        if new is not state:
            change += state.left
        signs = signs_of(change, layout.sizes, PLANES)
        end = add_signs(start, signs, layout.sizes)
        left = state.left
        if new is not state:
            left = (change - add_signs(np.zeros(len(start)), signs, layout.sizes)).astype(np.float32)
        # history, of no more bytes than the module
        most = PLANES * max(1, 4 * len(start) // (signs.bits.nbytes + signs.scales.nbytes))
        bits, scales = (
            np.concatenate([old, added])[-most:]
            for old, added in ((state.bits, signs.bits), (state.scales, signs.scales))
        )
        tensors = layout.tensors(end)
        return new._replace(tensors=tensors, round=state.round + 1, bits=bits, scales=scales, left=left)

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        adapters.set_start_factors(model, state.start)
        adapters.load_(model, state.tensors)

    def written_out(self) -> Self:
        return replace(self, server_lr=aggregation.server_rate(self.server, self.server_lr))

    def sized(self, steps: int, batch_size: int) -> Self:
        """Return the method with so many steps; where a round was longer, its warmup takes half of them at most."""
        warmup = self.warmup if 0 < self.steps <= steps else min(self.warmup, steps // 2)
        return replace(self, steps=steps, batch_size=batch_size, warmup=warmup)

    def work_on(self, module: Module | None) -> Footprint | None:
        """Return a device's work of training this module, with the state that its messages are counted by."""
        if module is None:
            return None
        # FedProx's origins; SCAFFOLD's w, c, c_k and correction; the module that signs are added to
        kept = (self.mu > 0) + self.scaffold * 4 + (self.wire == "sign")
        state = State(placeholders(module), WIDE >> 1)
        if self.wire == "sign":
            none = no_signs(Layout.of(state.tensors), PLANES)
            state = state._replace(round=1, bits=none.bits, scales=none.scales)
        return Footprint(
            "backward", module, state, checkpointing=self.recomputes, whole_gradient=self.clip > 0, kept=kept
        )


class AdamSteps:
    """AdamW's steps, each parameter's as soon as its gradient is complete, so that no two gradients are in memory.

    (LOMO, Lv et al. 2023, arXiv 2306.09782, Algorithm 1, with AdamW in SGD's place.)  Where the gradient's norm is clipped,
    which needs all of it, or on an accelerator, which takes many small steps slowly, all are taken after backward.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], how: Trained, device: str, *, whole: bool = False
    ) -> None:
        """With `whole`, all steps are taken after backward."""
        self.how, self.rate = how, how.own_lr
        self.at_once = not how.clip and device == "cpu" and not whole
        self.groups = [[p] for p in parameters] if self.at_once else [parameters]
        self.optimizers = [
            torch.optim.AdamW(g, how.own_lr, weight_decay=how.weight_decay) for g in self.groups
        ]
        self.origins = {p: p.detach().clone() for p in parameters} if how.mu else {}  # FedProx's w_global

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Take the steps in every backward pass while the block runs, where they can be taken there."""
        with ExitStack() as hooks:
            for number, (parameter, *_) in enumerate(self.groups if self.at_once else ()):
                step = partial(self._take, number)
                hook = parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
            yield

    def after_backward(self) -> None:
        """Take the steps that were not taken in backward."""
        if not self.at_once:
            self._take(0)

    def _take(self, number: int, *_: Any) -> None:
        """Take the step of a group of parameters that have their gradients, and forget these."""
        for parameter in self.groups[number]:
            if parameter in self.origins:
                prox_(parameter, self.origins[parameter], self.how.mu)
        if self.how.clip:
            torch.nn.utils.clip_grad_norm_(self.groups[number], self.how.clip)
        optimizer = self.optimizers[number]
        optimizer.param_groups[0]["lr"] = self.rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def hide_rows(model: Model, batch: Batch, privacy: Privacy, parameters: Mapping[str, nn.Parameter]) -> None:
    """Leave the mean gradient with each row hidden: DP-SGD's (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1).

    Dropout draws secret masks: of known ones, in turn, a row more would change those of the rows after it, and so the sum by
    more than its own gradient.
    """
    torch.manual_seed(secrets.randbits(63))
    total = PrivateSum(privacy, {name: np.zeros(tuple(p.shape)) for name, p in parameters.items()})
    for row in batch.single_rows():
        loss_tensor(model, row).backward()  # type: ignore[no-untyped-call]
        grads = {
            n: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.double().cpu().numpy()
            for n, p in parameters.items()
        }
        total.add(1.0, grads)
        for p in parameters.values():
            p.grad = None
    for name, mean in total.tensors().items():
        parameters[name].grad = torch.from_numpy(mean).to(parameters[name])


def prox_(parameter: nn.Parameter, origin: torch.Tensor, mu: float) -> None:
    """Add FedProx's mu (w - w_global) to a parameter's gradient."""
    if parameter.grad is not None:
        parameter.grad.add_(parameter.detach() - origin, alpha=mu)


# What travels -------------------------------------------------------------------------------------------


def prefixed(tensors: Mapping[str, np.ndarray], prefix: str) -> Tensors:
    """Return tensors with their names after `prefix`."""
    return {prefix + n: t for n, t in tensors.items()}


def no_signs(layout: Layout, planes: int = 0) -> Signs:
    """Return planes that change nothing."""
    numbers = int(layout.sizes.sum())
    shape = (planes, len(layout.sizes))
    return Signs(np.zeros((planes, -(-numbers // 8)), np.uint8), np.zeros(shape, np.float32))


def sizes_sent(sent: Payload) -> np.ndarray:
    """Return the sizes of the groups of what was sent."""
    groups = sent.scalars["groups"]
    assert isinstance(groups, bytes)
    return Layout({}, np.frombuffer(groups, np.uint32).reshape(-1, 2)).sizes


def rounded(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return float32, what travels; those that are float32 are the same arrays."""
    return {name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()}


def group(arrays: Mapping[str, Any], prefix: str = "") -> Tensors:
    """Return float32 tensors of the names that begin with `prefix` ("" is those without a "/"), without it.

    Those that are float32 are the same arrays.
    """
    return {
        n[len(prefix) :]: a.astype(np.float32, copy=False)
        for n, a in arrays.items()
        if (n.startswith(prefix) if prefix else "/" not in n)
    }


# LoRA's settings ----------------------------------------------------------------------------------------


FROM_ROWS: Final = {"eva": explained_directions, "gradient": gradient_directions}
STARTS: Final = (*adapters.INITS, *FROM_ROWS)


def check_start(
    start: str, r: int, *, dropout: float, wire: str, start_data: str, variant: str = "lora"
) -> None:
    """Raise ValueError, in plain words, for a start that is not known or does not go with the rest."""
    if start not in STARTS:
        raise ValueError(f"start = {start!r} is not one of {', '.join(STARTS)}")
    if start_data != "demo" and start not in FROM_ROWS:
        raise ValueError(
            f"start_data = {start_data!r} is what start=eva and gradient look at; start is {start}"
        )
    if start == "orthogonal" and r % 2:
        raise ValueError(f"start=orthogonal needs an even rank, r is {r}")
    if variant == "sb" and start not in (*FROM_WEIGHTS, "gradient"):
        raise ValueError(
            "variant=sb needs an A and a B that are not 0; use start=gradient (LoRA-SB), pissa (LoRA-XS) or olora"
        )
    if variant == "lora" and start in FROM_WEIGHTS and (dropout or wire != "fp32"):
        raise ValueError(
            f"start={start} moves a part of the base's weights into A and B, which dropout would drop and fp16 "
            f"would round; use dropout=0 and wire=fp32 (they are {dropout:g} and {wire})"
        )


def start_from_rows(model: Model, start: str, source: str) -> None:
    """Set the A of `model`'s LoRA, and a B that stays, by what its layers see on the first 32 rows of `source`.

    They are read by the columns of the tuning rows, or by their own where they lack those.  DataError when they cannot be read,
    ModelError when they show too little.
    """
    try:
        examples = read(source, limit=32, offline=True, columns=model.columns)
    except DataError:
        examples = read(source, limit=32, offline=True)
    if model.labels:  # the answers do not matter
        examples = [replace(example, response=model.labels[0]) for example in examples]
    rows, _ = encode_rows(model, examples, 128)
    batches = (collate(rows[i : i + 4], pad_id(model), model.device) for i in range(0, len(rows), 4))
    attachment = adapters.attachment_of(model)
    spec, part = attachment.spec, attachment.parts[0]
    assert isinstance(spec, adapters.Lora)
    assert isinstance(part, adapters.LoraPart)
    found = FROM_ROWS[start](model, part.layers, spec.r, batches)
    if part.frozen:
        adapters.set_start_factors(model, {n: found[n] for n in part.frozen})
    else:
        own = adapters.export(model)
        adapters.load_(model, own | {n: a for n, a in found.items() if ".lora_A." in n})


def check_targets(targets: str) -> None:
    """Raise ValueError where no layers are named between two commas, or none at all."""
    if not all(target.strip() for target in targets.split(",")):
        raise ValueError(
            f"targets = {targets!r} must be {adapters.ALL_LINEAR}, {adapters.QUERY_VALUE} or the layers' names, as q_proj,k_proj"
        )
