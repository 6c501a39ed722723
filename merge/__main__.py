"""`python -m merge` and the console script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and end the process with its status."""
    try:
        from merge.cli import main as run_cli

        run_cli()
    except KeyboardInterrupt:
        # Ctrl-C before there is anything to unwind.
        os._exit(130)
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        # Taking torch down module by module takes 0.4 s, and everything is on the disk already.
        os._exit(stop.code if isinstance(stop.code, int) else 1)


if __name__ == "__main__":
    main()
