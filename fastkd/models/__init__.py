"""Networks: the zoo, timm and torchvision by name, their taps and their cost."""

from fastkd.models.counting import Count, count
from fastkd.models.registry import create_model, list_models, model_from_file
from fastkd.models.taps import Tapped, available_taps

__all__ = [
    "Count",
    "Tapped",
    "available_taps",
    "count",
    "create_model",
    "list_models",
    "model_from_file",
]
