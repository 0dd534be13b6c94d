"""One rank of a run that records everything that small networks can: `recorded_ranks.py DIR`."""

import os
import sys

import fastkd.data.sources.synthetic
from fastkd.cli.commands import main
from fastkd.testing.recipes import TINY_QUICKSTART

KEYS = "student.width=2 teacher.epochs=1 teacher.min_accuracy=0 epochs=2 out=run "
KEYS += "report.record=weights,kl,samples,alignment,time"

if __name__ == "__main__":
    fastkd.data.sources.synthetic.NUM_IMAGES["val"] = 49
    os.chdir(sys.argv[1])
    raise SystemExit(main(["train", *TINY_QUICKSTART, *KEYS.split()]))
