# SPDX-License-Identifier: Apache-2.0
"""Tune on real devices: the server that asks them, the device that answers, and the way between the two.

    server.py     run a recipe on the devices that join       device.py, worker.py    join, and do a device's work
    remote.py     ask devices that die, come back and lie     asking.py               a round in progress: who is waited for
    table.py      which key is which client                   pace.py, conditions.py  how long is waited; when a device declines
    orders.py     what is asked and answered, as bytes        mail.py                 where orders and answers wait
    link.py       what a way to devices can do                flower/                 the ways: over Flower
    keys.py       keys and certificates                       audit.py                the log of joins and answers
    status.py     how a run stands, from its folder
    eval_*.py     a result on the devices' held-out rows      calibration_*.py        a compression's Hessians from devices
    result.py     a run's result on its way to a device       held_out.py             rows that a device does not train on

The rounds are those of a simulated fleet (`tuning/rounds/rounds.py`), so a run ends in the same digest.
"""

from __future__ import annotations

from typing import Final

PORT: Final = 8470  # where a server listens for devices
