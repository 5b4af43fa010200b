# SPDX-License-Identifier: Apache-2.0
"""Take heads, channels or blocks out of a model, and train what is left."""
