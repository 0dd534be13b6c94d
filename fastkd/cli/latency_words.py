"""The words of `fastkd latency`, for the parser in `fastkd.cli.arguments`."""

import argparse
import re

from fastkd.cli.parser import Commands, add_words
from fastkd.printable import shown

__all__ = ["add_latency"]

LATENCY_HELP = """
examples:
  fastkd latency runs/mine --on eager,compile,ort-cpu --batch 1,8 --threads 1,2
  fastkd latency timm:mobilenetv2_100 --size 224 --layers
  fastkd latency wrn_40_2 student.block=G:4 student.depth=5,3,5
  fastkd latency student.onnx --on ort-cpu,openvino --json here.json
  fastkd latency --script there.py --batch 1,8      a file to run elsewhere as
      python there.py student.onnx                  with onnxruntime and numpy
  fastkd latency --read student.json here.json      both in one table

Each answer is compared with torch's before it is timed. What is missing on this
machine is named, and the rest is measured. exit codes: 0 done, 1 an answer was
wrong or a backend failed, 2 wrong request or nothing could be measured.
"""


def add_latency(commands: Commands) -> None:
    """The command and its options."""
    latency = commands.add_parser(
        "latency",
        help="milliseconds that a network takes here, by torch, onnxruntime or OpenVINO",
        description="Measure how long a network takes: warmed up until steady, then the 10th,\n"
        "50th and 90th percentile of a call.",
        epilog=LATENCY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    latency.add_argument(
        "what",
        nargs="?",
        metavar="MODEL | RUN | FILE.onnx",
        help="network name, run folder, weight file of fastkd, or ONNX file",
    )
    add_words(latency, "key=value", "of MODEL: student.block=G:4 student.width=0.5")
    latency.add_argument("--weights", metavar="FILE", help="weights of MODEL; default: untrained")
    latency.add_argument(
        "--size", type=_size, metavar="N|HxW", help="of the images; default: the network's own"
    )
    latency.add_argument("--classes", type=_one, metavar="C", help="of MODEL; zoo default: 100")
    latency.add_argument(
        "--on",
        type=_names,
        metavar="A,B",
        help="of eager, compile, ort-cpu, openvino, ort-cuda, tensorrt; default: eager,ort-cpu",
    )
    latency.add_argument("--batch", type=_numbers, metavar="1,8", help="images a call; default: 1")
    latency.add_argument("--threads", type=_numbers, metavar="1,2", help="of the CPU; default: 1")
    latency.add_argument("--layers", action="store_true", help="also the time of each layer")
    latency.add_argument("--json", metavar="OUT", help="write the result to this new file")
    latency.add_argument(
        "--script", metavar="OUT.py", help="write a script that measures an ONNX file elsewhere"
    )
    latency.add_argument(
        "--read", nargs="+", metavar="FILE.json", help="show what --json or the script wrote"
    )


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,4}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected numbers above 0, such as 1,8")
    return list(dict.fromkeys(map(int, words)))


def _one(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number above 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch("([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: expected a side or HxW, such as 224 or 96x128"
        )
    return int(match[1]), int(match[2] or match[1])


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(word for word in text.split(",") if word))
