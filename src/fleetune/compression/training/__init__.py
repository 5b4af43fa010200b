# SPDX-License-Identifier: Apache-2.0
"""Train in steps that are checkpointed, so that a training resumes bit for bit."""
