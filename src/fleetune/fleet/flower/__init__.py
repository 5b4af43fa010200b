# SPDX-License-Identifier: Apache-2.0
"""Carry orders and answers by Flower's Fleet API: `gate.py` on the server, `node.py` on a device, the same bytes in `wire.py`.

This folder is the only place that imports `flwr`, and it uses parts of it that are not its public interface: the range in
`pyproject.toml` is one minor release, and the loopback tests run every part that is used.

What is Flower's: the wire format (protobuf over HTTP, TLS), node keys and their signatures, heartbeats, the store of
messages and objects, and its handlers of all of these.  What is otherwise than in its own programs, and why:

- The server's own process holds the Fleet API, and only that.  Flower's SuperLink also serves, on the same port and
  without a login, the interface by which apps are run and keys registered; here there is nothing to reach.
- No app is sent, so a device never runs code that comes from a server.  Flower's SuperNode runs whatever it is sent, in a new
  process for every message, which would load the model anew each round.
- State is in memory: the run's folder has all that a restarted server needs.
- A device that is refused (401, 403, 412) waits and tries again with the same key; Flower's own client ends its process.
- A request's body has a limit (`gate.LIMIT`); Flower reads any, before it looks at the key.
- An upload belongs to an open order of the device and has a bound, and a signed time counts once (`limits.py`).  Flower keeps
  what comes, and takes the same signature for five minutes.
- The server's clock cannot be set while it runs (`clock.py`).
- Polls every 0.2 s instead of 3 s, heartbeats every 10 s instead of 30 s, so that a dead device is noticed sooner.
"""

from __future__ import annotations

import os

# Flower would report every start to its makers and look for updates otherwise
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
