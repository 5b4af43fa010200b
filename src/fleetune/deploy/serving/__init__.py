# SPDX-License-Identifier: Apache-2.0
"""Serve a model: the OpenAI-compatible front, the engines behind it, and their client."""
