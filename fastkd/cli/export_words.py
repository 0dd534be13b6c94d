"""The words of `fastkd export`, for `fastkd.cli.arguments`."""

import argparse

from fastkd.cli.parser import Commands, add_words

__all__ = ["add_export"]

EXPORT_HELP = """
examples:
  fastkd export runs/.. --out student.onnx
  fastkd export runs/.. --out student.onnx --normalize --dynamic-batch
  fastkd export runs/.. --out student.onnx --check all data.root=DATA
  fastkd export runs/.. --format torch-export --out student.pt2
  fastkd export runs/.. --format hf --out student --push USER/NAME
  fastkd export timm:resnet18 --weights resnet18.safetensors --out resnet18.onnx
  fastkd eval student.onnx data.root=DATA

The file is compared with the network on validation images of the run before it
gets its name; without them, on noise. docs/export.md says more.
"""


def add_export(commands: Commands) -> None:
    """`fastkd export`."""
    parser = commands.add_parser(
        "export",
        help="write a network for other programs: ONNX, torch.export, timm, Hugging Face Hub",
        description="Export the student of RUN, or MODEL with --weights. The file is compared\n"
        "with it before it gets its name.",
        epilog=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="RUN | MODEL", help="run folder, or network name")
    parser.add_argument("--out", metavar="PATH", required=True, help="file; of hf a folder")
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="onnx|torch-export|timm|hf",
        help="onnx; timm: weights in timm's names; hf: a folder for the Hugging Face Hub",
    )
    parser.add_argument("--weights", metavar="FILE", help="weights of MODEL")
    parser.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        help="fold batch norm into convolutions (onnx, torch-export: done unless --no-fuse)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="onnx: default: torch's own")
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="any number of images in a call, not one"
    )
    parser.add_argument("--half", action="store_true", help="fp16 weights and arithmetic")
    parser.add_argument(
        "--normalize", action="store_true", help="normalise inside: images in 0..1 go in"
    )
    parser.add_argument(
        "--check",
        default="512",
        metavar="N|all",
        help="validation images to compare on (512), in batches of 32",
    )
    parser.add_argument("--push", metavar="REPO", help="hf: upload the folder to the hub")
    parser.add_argument(
        "--force", action="store_true", help="replace the file at PATH, or those of hf"
    )
    add_words(parser, "key=value", "recipe keys such as data.root=DATA data.image_size=224")
