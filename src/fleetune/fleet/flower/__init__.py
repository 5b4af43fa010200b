# SPDX-License-Identifier: Apache-2.0
"""Carry orders and answers by Flower's Fleet API, and by one request of our own beside it.

    gate.py       the server: open the door, and who is there        node.py    the device
    door.py       keep out what no registered key has signed         wire.py    the same on both sides
    exchange.py   an answer and the next order in one request        limits.py  a signature once, refusals counted
    state.py      Flower's table of devices                          clock.py   a server's clock that cannot be set

`server_app.py` and `client_app.py` do the same inside a Flower that is there already: as the app that `shim.py` writes and
`flwr run` takes.

This folder is the only place that imports `flwr`, and it uses parts of it that are not its public interface: the range in
`pyproject.toml` is one minor release, and the loopback tests run every part that is used.

What is Flower's: how a device comes in and leaves, its heartbeats and the table of nodes (protobuf over HTTP, TLS), node keys
and their signatures.  What is otherwise than in its own programs, and why:

- The server's own process holds these requests, our request beside them, and nothing else (`door.py`).  Flower's SuperLink also
  serves, on the same port and without a login, the interface by which apps are run and keys registered.  Its messages are not
  there either: a device could announce objects and upload them, and nobody would free them.
- No app is sent, so a device never runs code that comes from a server.  Flower's SuperNode runs whatever it is sent, in a new
  process for every message, which would load the model anew each round.
- State is in memory: the run's folder has all that a restarted server needs.
- Our devices send an answer and get the next order in one request (`exchange.py`), which waits for the order; Flower's take
  about ten requests, and ask every 3 s.  What a server needs for a device and a round fell from 41 ms to 1.4 ms, half of
  it the check of the signature.
- A device that is refused (401, 403, 412) waits and tries again with the same key; Flower's own client ends its process.
- A request that no registered key has signed is refused before its body is read, and a body has a limit (`door.py`); Flower
  reads any, before it looks at the key.
- An answer belongs to an open order of the device and has a bound (`mail.py`), and a signed time counts once (`limits.py`).
  Flower keeps what comes, and takes the same signature for five minutes.
- A device reads what a server sends up to a limit, and nothing compressed (`node.py`); Flower's client reads any.
- The server's clock cannot be set while it runs (`clock.py`).
- Heartbeats come every 10 s instead of 30 s, so that a dead device is noticed sooner.
"""

from __future__ import annotations

import os

# Flower would report every start to its makers and look for updates otherwise
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
