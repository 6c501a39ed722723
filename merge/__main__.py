"""`python -m merge` and the console script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and end the process with its status."""
    try:
        from merge.cli.main import main as run_cli

        run_cli()
    except KeyboardInterrupt:
        # Ctrl-C before there is anything to unwind.
        os._exit(130)
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        # Taking torch down module by module takes 0.4 s, and everything is on the disk already.
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _leave_current_folder() -> None:
    """Take the current folder off the front of the path, where `python -m` puts it.

    Nothing is imported before: a `json.py` lying there would be. A checkout that is the current
    folder goes to the end, where it hides nothing.
    """
    here = os.path.realpath(os.curdir)
    if sys.flags.safe_path or not sys.path or os.path.realpath(sys.path[0]) != here:
        return
    del sys.path[0]
    if os.path.dirname(os.path.dirname(os.path.realpath(__file__))) == here:  # noqa: PTH120
        sys.path.append(here)


if __name__ == "__main__":
    _leave_current_folder()
    main()
