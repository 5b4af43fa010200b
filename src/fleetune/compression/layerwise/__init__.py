# SPDX-License-Identifier: Apache-2.0
"""Solve linear layers block by block: Hessians, grids, the column loop and its driver."""
