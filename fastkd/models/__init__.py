"""Networks: the zoo, timm and torchvision by name, their taps, their cost, and rewrites."""

from fastkd.models.counting.count import Count, count
from fastkd.models.fused import kernels_report, use_kernels
from fastkd.models.registry import create_model, list_models, model_from_file
from fastkd.models.rewrite.cheapen import cheapen
from fastkd.models.rewrite.fuse import fuse
from fastkd.models.rewrite.shortcuts import remove_shortcuts
from fastkd.models.rewrite.shorten import shorten
from fastkd.models.taps import Tapped, available_taps

__all__ = [
    "Count",
    "Tapped",
    "available_taps",
    "cheapen",
    "count",
    "create_model",
    "fuse",
    "kernels_report",
    "list_models",
    "model_from_file",
    "remove_shortcuts",
    "shorten",
    "use_kernels",
]
