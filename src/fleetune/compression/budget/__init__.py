# SPDX-License-Identifier: Apache-2.0
"""Choose a grid for each matrix so that the file keeps within a size and the model changes least."""
