# SPDX-License-Identifier: Apache-2.0
"""Write the sections of a run's page: HTML, or nothing where the run has no data for one."""
