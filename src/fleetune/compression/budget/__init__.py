# SPDX-License-Identifier: Apache-2.0
"""Measure what errors cost: choose the grid of each matrix by it within a size, and what each calibration token counts."""
