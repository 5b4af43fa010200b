# SPDX-License-Identifier: Apache-2.0
"""The sections of a run's page: each makes HTML of a run, or nothing where the run says nothing of it."""
