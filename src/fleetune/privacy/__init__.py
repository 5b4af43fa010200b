# SPDX-License-Identifier: Apache-2.0
"""Differential privacy: the mechanism that releases a sum, and the accountant of many releases."""
