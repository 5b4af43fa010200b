# SPDX-License-Identifier: Apache-2.0
"""From the master artefact to files that runtimes read; one format a file, each a repacking of the same codes."""
