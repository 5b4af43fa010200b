# SPDX-License-Identifier: Apache-2.0
"""Fleetune."""

__version__ = "0.1.0"
