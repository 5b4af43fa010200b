"""Notice as soon as it shows that a run diverges, and say once what to change; docs/watch.md lists the signs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fleetune.common.events import ClientReply, Diverging, Event, RoundDone, RoundEvaluated
from fleetune.common.paired import ERRORS

BLOWN_UP: Final = 2.0  # times a client's first loss, or the base's validation loss
SMALL: Final = 0.005  # of the loss: a rise that is sure and this small is no divergence
UNKNOWN_NOISE: Final = 0.05  # of the loss, where one row gives no error


def advice(method: Any, factor: float, noise: float = 0.0) -> str:
    """Say how to lower the learning rate of a method by a factor (infinity: nobody knows), and that it has a clip.

    Where privacy adds `noise`, that is the likelier cause.
    """
    if noise:
        return (
            "take more clients or rows, fewer numbers (K, r), or a larger epsilon: the noise may be too loud"
        )
    if factor == math.inf:
        return "let the learning rate be found (--set lr=auto)"
    lr, words = getattr(method, "lr", None), "lower the learning rate"
    if isinstance(lr, float) and 0 < lr < math.inf:
        rate = float(f"{lr / factor:.1g}")
        words += f" to {rate:g} (--set lr={rate:g})"
    return words + (", or limit the steps with --set clip=.." if getattr(method, "clip", None) == 0 else "")


def noise_of(loss: float, error: float | None) -> float:
    """Return by how much a loss may rise by chance, given the standard error of its change, if that is known."""
    return UNKNOWN_NOISE * abs(loss) if error is None else ERRORS * error


class Watch:
    """Hears the events of a run; `heard` gives the event that says that it diverges, once."""

    def __init__(
        self,
        method: Any,
        objective: str,
        past: Iterable[Mapping[str, Any]],
        start: float | None = None,
        noise: float = 0.0,
    ) -> None:
        """Take up a run whose recorded events are `past`; an objective that is not the loss is not watched.

        `start` is the loss before round 1 where that is not the base's.
        """
        self.method, self.noise, self.told = method, noise, objective != "loss"
        self.first = self.lowest = math.nan  # validation loss before round 1, and the lowest so far
        self.best = 0
        self.clients: dict[int, float] = {}  # the first loss that each stated
        self.now: dict[int, float | None] = {}  # the last of a round; infinity of a reply that is not finite
        for event in past:
            self.told |= event["event"] == Diverging.event
            if event["event"] == ClientReply.event and isinstance(event.get("loss"), float):
                self.clients.setdefault(int(event["client"]), event["loss"])
            elif event["event"] == RoundEvaluated.event:
                self._evaluated(int(event["round"]), event.get("loss"))
                if event["round"] == 0 and start is not None:
                    self.starts_at(start)

    def starts_at(self, loss: float) -> None:
        """Take another loss as that before round 1: where an untrained module changes the model."""
        self.first = self.lowest = loss

    def heard(self, event: Event) -> Diverging | None:
        """Return what there is to say after an event, None for nothing."""
        text = ""
        if isinstance(event, ClientReply):
            lost = math.inf if "not finite" in event.reason else None
            self.now[event.client] = event.loss if isinstance(event.loss, float) else lost
        elif isinstance(event, RoundDone):
            text = self._of_replies(event.round)
        elif isinstance(event, RoundEvaluated):
            text = self._of_round(event)
        if not text or self.told:
            return None
        self.told = True
        return Diverging(round=event.round, text=text)  # type: ignore[attr-defined]

    def _of_replies(self, round: int) -> str:
        now, before = {c: x for c, x in self.now.items() if x is not None}, self.clients
        told = sorted((x / first, x) for c, x in now.items() if (first := before.get(c, self.first)) > 0)
        self.now, self.clients = {}, {c: x for c, x in now.items() if x < math.inf} | before
        times, loss = told[(len(told) - 1) // 2] if told else (0.0, 0.0)
        if times <= BLOWN_UP:
            return ""
        what = (
            "reply is not finite" if times == math.inf else f"loss is {loss:.3f}, {times:.3g} times its first"
        )
        words = advice(self.method, math.inf if times == math.inf else 10, self.noise)
        return f"round {round}: the median client's {what}; {words}"

    def _of_round(self, event: RoundEvaluated) -> str:
        loss, lowest, best = event.loss, self.lowest, self.best
        self._evaluated(event.round, loss)
        if loss is None or not math.isfinite(loss) or not math.isfinite(lowest):
            return ""
        noise = noise_of(self.first, event.change_error)
        if loss - lowest <= max(noise, SMALL * abs(self.first), (self.first - lowest) / 2):
            return ""
        since = "before tuning" if not best else f"after round {best}"
        words = advice(self.method, 3 if best else 10, self.noise)
        keeps = "; --keep best keeps the best round" if best else ""
        return (
            f"round {event.round}: the validation loss has risen to {loss:.3f} from {lowest:.3f} {since}, by more than noise "
            f"({noise:.3f}); {words}{keeps}"
        )

    def _evaluated(self, round: int, loss: Any) -> None:
        if not isinstance(loss, float) or not math.isfinite(loss):
            return
        if round == 0:
            self.first = loss
        if not self.lowest <= loss:
            self.lowest, self.best = loss, round
