# SPDX-License-Identifier: Apache-2.0
"""Make directions from seeds, view a model at a point of them, estimate slopes, store the result as a ledger."""
