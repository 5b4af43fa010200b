"""Tune on real devices: the server that asks them, the device that answers, and the way between the two.

    server.py     run a recipe on the devices that join       device.py, worker.py    join, decline, do a device's work
    remote.py     ask devices that die, come back and lie     line.py                 a device's requests to the server
    table.py      which key is which client                   device_state.py         what a device keeps on its disk
    door.py       the requests that devices make              http_server.py          an app in a thread
    orders.py     what is asked and answered, as bytes        link.py                 what a way to devices can do
    keys.py       keys and certificates                       audit.py                the log of joins and answers
    status.py     how a run stands, from its folder           page.py                 the same in a browser
    eval_*.py     a result on the devices' held-out rows      calibration_*.py        a compression's Hessians from devices
    result.py     a run's result on its way to a device       flower/                 the same rounds inside a Flower

The rounds are those of a simulated fleet (`tuning/rounds/rounds.py`), so a run ends in the same digest.
"""

from __future__ import annotations

from typing import Final

PORT: Final = 8470  # where a server listens for devices
