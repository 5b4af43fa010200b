# SPDX-License-Identifier: Apache-2.0
"""Tune on real devices: the server that asks them, the device that answers, and the way between the two.

    server.py     run a recipe on the devices that join       device.py, worker.py   join, and do a device's work
    remote.py     ask devices that die, come back and lie     table.py               which key is which client
    orders.py     what is asked and answered, as bytes        keys.py                keys and certificates
    mail.py       where orders and answers wait          flower/                 the way: Flower's Fleet API

The rounds are those of a simulated fleet (`tuning/rounds.py`), so a run ends in the same digest.
"""
