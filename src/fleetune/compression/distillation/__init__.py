# SPDX-License-Identifier: Apache-2.0
"""Train a student on a teacher: divergences, rewards, and the state that resumes."""
