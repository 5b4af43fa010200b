# SPDX-License-Identifier: Apache-2.0
"""The folder that a run leaves, and the report made from it."""
