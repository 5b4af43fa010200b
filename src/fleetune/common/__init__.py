# SPDX-License-Identifier: Apache-2.0
"""Share what every folder needs: files, locks, memory, text, settings, the registry."""
