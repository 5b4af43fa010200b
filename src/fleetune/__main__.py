# SPDX-License-Identifier: Apache-2.0
"""`python -m fleetune` is the `fleetune` command."""

import sys

from fleetune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
