# SPDX-License-Identifier: Apache-2.0
"""State the version of Fleetune."""

__version__ = "0.1.0"
