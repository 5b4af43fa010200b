# SPDX-License-Identifier: Apache-2.0
"""Measure size, speed, memory and quality, in torch and in llama.cpp."""
