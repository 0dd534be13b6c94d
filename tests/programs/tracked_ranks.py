"""One rank of a run that TensorBoard is shown: `tracked_ranks.py DIR`."""

import os
import sys

import fastkd.data.sources.synthetic
from fastkd.cli.commands import main

KEYS = "data.name=synthetic data.train_limit=64 student.name=resnet8 student.width=0.5 "
KEYS += "batch_size=32 precision=fp32 compile=off device=cpu teacher=null losses.kd=null "
KEYS += "losses.ce.weight=1 baseline.lrs= epochs=2 out=run track=tensorboard"

if __name__ == "__main__":
    fastkd.data.sources.synthetic.NUM_IMAGES["val"] = 49
    os.chdir(sys.argv[1])
    raise SystemExit(main(["train", *KEYS.split()]))
