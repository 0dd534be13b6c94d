"""`python -m fastkd` is the `fastkd` command."""

import sys

from fastkd.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
