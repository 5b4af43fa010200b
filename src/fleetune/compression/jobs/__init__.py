# SPDX-License-Identifier: Apache-2.0
"""Compression from a request to a finished folder, for each kind of method."""
