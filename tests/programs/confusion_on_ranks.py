"""One of several ranks evaluates its share of two label maps; prints what it finds as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from pixel_maps import Maps, as_it_is, example

from fastkd.compute.precision import Precision
from fastkd.compute.ranks import open_world
from fastkd.evaluation.evaluate import evaluate

if __name__ == "__main__":
    with open_world("cpu") as world:
        maps = Maps(*example(num=2), rank=world.rank, size=world.size)
        print(json.dumps(evaluate(as_it_is, maps, Precision("fp32", "cpu"), world, "pixel")))
