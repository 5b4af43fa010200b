# SPDX-License-Identifier: Apache-2.0
"""The commands with several actions, one file each."""
