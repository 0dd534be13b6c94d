"""The words of `fastkd compress`, for the parser in `fastkd.cli.arguments`."""

import argparse

from fastkd.cli.parser import Commands, add_words, positive

__all__ = ["add_compress"]

COMPRESS_HELP = """
examples:
  fastkd compress wrn_40_2 --target latency=0.5x --data DIR data.image_size=32
  fastkd compress timm:resnet18 --weights teacher.pth --target latency=5ms \\
      --on ort-cpu --threads 4 --data photos
  fastkd compress runs/mine --target macs=0.3x --data photos epochs=30
  fastkd compress resnet56 --target latency=0.5x --data photos --dry-run

Keys are those of `fastkd train folder`, for all trainings: epochs=, optim.lr=,
data.image_size=, augment.crop=pad, losses.at=null, losses.dkd.weight=1, ..;
student.KEY= is the network's own, such as student.width=0.5.
The same command again resumes. docs/compress.md has the phases and the walk to
a prediction.
exit codes: 0 target met, or dry run; 1 measured above the target, or a
training failed; 2 wrong request, or a target that cannot be met.
"""


def add_compress(commands: Commands) -> None:
    """The command and its options."""
    compress = commands.add_parser(
        "compress",
        help="find and train a smaller student for a latency, MACs or parameters",
        description="Measure a network and its cheap blocks where they will run, find students\n"
        "under the target, distil the best, and measure what was exported.",
        epilog=COMPRESS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compress.add_argument(
        "model", metavar="MODEL | RUN", help="network name, run folder or weight file of fastkd"
    )
    add_words(compress, "key=value", "recipe keys for all trainings")
    compress.add_argument(
        "--target",
        required=True,
        metavar="WHAT=LIMIT",
        help="latency=5ms, latency=0.5x, macs=0.3x or params=1M; x: share of the original",
    )
    compress.add_argument("--data", metavar="DIR", help="folder of the images, as data.root=")
    compress.add_argument(
        "--weights", metavar="FILE", help="of MODEL; default: it is trained on the images first"
    )
    compress.add_argument(
        "--on", default="ort-cpu", metavar="A", help="one of `fastkd latency`; default: ort-cpu"
    )
    compress.add_argument("--threads", type=positive, default=1, metavar="N", help="default: 1")
    compress.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="images a call; default: 1"
    )
    compress.add_argument(
        "--out", metavar="DIR", help="the folder; default: one below runs/compress"
    )
    compress.add_argument(
        "--dry-run", action="store_true", help="measure and search, but train nothing"
    )
    compress.add_argument(
        "--short-epochs",
        type=positive,
        default=5,
        metavar="N",
        help="of the distillation that ranks the best students; default: 5",
    )
    compress.add_argument(
        "--keep", type=positive, default=8, metavar="N", help="students that it ranks; default: 8"
    )
    compress.add_argument(
        "--draws", type=positive, default=100, metavar="N", help="random students; default: 100"
    )
    compress.add_argument(
        "--stages", type=positive, default=1, metavar="N", help="shrink in N trainings; default: 1"
    )
    compress.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="last trainings of each; default: 1"
    )
