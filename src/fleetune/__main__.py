# PYTHON_ARGCOMPLETE_OK
"""The `fleetune` command, and `python -m fleetune`."""

import sys

try:
    from fleetune.cli.main import main
except KeyboardInterrupt:  # Ctrl-C while the program is loaded
    sys.stderr.write("stopped\n")
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
