"""`python -m merge` and the console script."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its status."""
    from merge.cli import main as run_cli

    run_cli()


if __name__ == "__main__":
    main()
