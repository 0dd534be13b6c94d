"""A tracked run that dies when its second epoch is done but not saved: `tracked_runs.py DIR`."""

import sys
from pathlib import Path

import tiny

from fastkd.training.trainer import Trainer

if __name__ == "__main__":
    folder = tiny.prepare(Path(sys.argv[1]))
    tiny.at_call(Trainer, "save", 1, lambda *_: tiny.die())
    words = ["track=tensorboard,wandb,mlflow,trackio", "save_steps=null", "epochs=3", "out=run"]
    raise SystemExit(tiny.command(folder, "train", "--config", "recipe.yaml", *words))
