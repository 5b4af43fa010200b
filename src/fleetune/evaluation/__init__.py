# SPDX-License-Identifier: Apache-2.0
"""Measure models: losses, generated answers, scores, objectives."""
