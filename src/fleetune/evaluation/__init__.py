# SPDX-License-Identifier: Apache-2.0
"""Losses, generated answers, scores and objectives."""
