"""`python -m fastkd.train` and `torchrun -m fastkd.train` are the `fastkd train` command."""

import sys

from fastkd.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
