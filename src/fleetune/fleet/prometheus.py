# SPDX-License-Identifier: Apache-2.0
"""Write how a run stands as metrics that Prometheus reads (text format 0.0.4).

Counters are of finished rounds, since a reply that counted may be refused at the end of its round.  No device has a
series of its own, so their number does not grow with the fleet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.common.events import FleetShown
from fleetune.errors import UsageError
from fleetune.fleet.keys import INSTALL
from fleetune.fleet.status import STATES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def text(now: FleetShown) -> bytes:
    """Return the metrics; UsageError where the library that writes them is not installed."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise UsageError("metrics need prometheus_client, which is not installed", hint=INSTALL) from error

    class Now(Collector):
        """The registry asks it once."""

        def collect(self) -> Iterator[Metric]:
            return _metrics(now)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    return generate_latest(registry)


def _metrics(now: FleetShown) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily("fleetune_run", "The run.", {"run": Path(now.run).name})
    for name, what, value in (
        ("fleetune_round", "Round in progress, 0 before the first.", now.round),
        ("fleetune_rounds", "Rounds to run.", now.rounds),
        ("fleetune_round_seconds", "Time of the last finished round.", now.round_seconds),
        ("fleetune_validation_loss", "Latest loss on the held-out rows, nats.", now.loss),
        ("fleetune_server_memory_bytes", "Resident memory of the server.", now.rss),
        ("fleetune_server_heard_timestamp_seconds", "Time of the server's last word.", now.t),
    ):
        if value is not None:
            yield GaugeMetricFamily(name, what, value)
    states = GaugeMetricFamily("fleetune_devices", "Devices by what they do.", labels=["state"])
    for state in dict.fromkeys((*STATES, *now.states)):
        states.add_metric([state], now.states.get(state, 0))
    yield states
    replies = CounterMetricFamily("fleetune_replies", "Replies of finished rounds.", labels=["status"])
    for status, count in now.replies.items():
        replies.add_metric([status], count)
    yield replies
    traffic = CounterMetricFamily("fleetune_traffic_bytes", "Bytes of finished rounds.", labels=["direction"])
    traffic.add_metric(["up"], now.bytes_up)
    traffic.add_metric(["down"], now.bytes_down)
    yield traffic
