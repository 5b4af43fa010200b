# SPDX-License-Identifier: Apache-2.0
"""Files, locks, memory and text: what every other folder may use."""
