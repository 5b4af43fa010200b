# SPDX-License-Identifier: Apache-2.0
"""Train a student on a teacher: the student, divergences and rewards."""
