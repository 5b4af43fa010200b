# SPDX-License-Identifier: Apache-2.0
"""Serve a model over an engine: the front door, the engines and their client."""
