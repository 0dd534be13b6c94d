"""What `fastkd.distill` returns: both networks, the numbers, and predictions with them."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.data.batch import LabelKind
from fastkd.data.loaders.in_order import in_order
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import answer, evaluating
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.models.card import title_of
from fastkd.output.console import duration
from fastkd.printable import few
from fastkd.storage.weight_file import WeightFile
from fastkd.storage.weights import load_into

__all__ = ["Result"]


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """What `distill` returns."""

    student: nn.Module
    """The student after the last epoch, in evaluation mode: the network that was passed in, its
    average with ema, with the head that a loss gave it. `best` is that of the best epoch."""
    metrics: dict[str, Any]
    """accuracy_last, accuracy_best (or map_.., miou_..), best_epoch, images_per_s, ...; `teacher`:
    its name and accuracy; `history`: one row per epoch. With label maps also `class_iou_best` and
    `class_iou_last`, by class id."""
    run_dir: Path | None
    """Folder of last.pt, best.safetensors, config.yaml, metrics and curves.png; None if nothing was
    written."""
    placement: Placement | None = None
    """Where and how it was trained, which predictions repeat."""
    label_kind: LabelKind = "class"
    """What is labelled."""
    best_state: Mapping[str, Any] | None = None
    """State dict of the best epoch's network if there is no folder."""

    @cached_property
    def best(self) -> nn.Module:
        """The network of the best epoch (`metrics["best_epoch"]`) in evaluation mode.

        A copy: `student` stays as the last epoch left it. Made when it is first asked for, from
        memory, or with `out=` from best.safetensors.
        """
        try:
            network = copy.deepcopy(self.student)
        except Exception as error:  # a module may fail to be copied in any way
            raise UserError(
                f"{title_of(self.student)} cannot be copied ({error}), so the best epoch's weights "
                f"have no network. Into another one like it they are loaded by "
                f"fastkd.storage.weights.load_into(network, result.best_weights)"
            ) from error
        network.zero_grad(set_to_none=True)
        if self.best_state is None:
            load_into(network, self.best_weights)
        else:
            network.load_state_dict(self.best_state)
        network.eval()
        return network

    @cached_property
    def best_weights(self) -> Mapping[str, Any]:
        """State dict of the best epoch's network, on the CPU."""
        if self.best_state is not None:
            return self.best_state
        if self.run_dir is None:
            raise UserError("no epoch was evaluated, so none is the best: use result.student")
        return WeightFile.open(self.run_dir).tensors

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per epoch, as in metrics.jsonl: train_loss, val_accuracy, lr, ..."""
        return self.metrics["history"]

    @property
    def teacher_accuracy(self) -> float | None:
        """Accuracy (mAP for several labels, mIoU for label maps) of the teacher, of several
        together, as a share of 1.

        None: there is no teacher, or what it answers are not the classes of the data.
        """
        teacher = self.metrics.get("teacher") or {}
        return teacher.get(headline(teacher))

    def predict(
        self,
        loader: Iterable[Any] | Tensor,
        *,
        best: bool = False,
        probabilities: bool = False,
    ) -> Tensor:
        """Logits [N, classes] of every image of a loader, in its order; fp32, on the CPU.

        Of a network for segmentation [N, classes, h, w], as the network gives them: argmax(1) is
        the label map.

        Computed as in the validation: in evaluation mode, in the precision of the run, on the
        device where the network is now. The images must be normalised as those of the training.
        Each of several processes predicts its own share of the images, without those that a
        DistributedSampler repeats.

        Args:
            loader: yields what a train_loader may, or is the images [N, C, H, W] as one tensor. It
                must not shuffle or leave images out.
            best: with the network of the best epoch.
            probabilities: their softmax over the classes; the sigmoid where images have several
                labels.

        Raises:
            UserError: the loader shuffles, drops images, or yields something else or nothing, or
                the label maps of its images differ in size.
        """
        network = self.best if best else self.student
        device, precision, layout = self._place(network)
        rows = list[Tensor]()
        # Reading a loader draws random numbers, which are the caller's.
        with torch.random.fork_rng([]), torch.no_grad(), evaluating(network):
            for images_NCHW in in_order(loader):
                images_NCHW = images_NCHW.to(device, memory_format=layout)
                rows.append(answer(network, images_NCHW, precision).cpu())
        if not rows:
            raise UserError("predict: the loader yields no image")
        if len(sizes := {tuple(row.shape[2:]) for row in rows}) > 1:
            found = few(f"{height}x{width}" for height, width in sorted(sizes))
            raise UserError(
                f"predict gives the answers to all images as one tensor, and those of this loader "
                f"have several sizes ({found}): call it for the images of each size"
            )
        logits_NC = torch.cat(rows)
        if not probabilities:
            return logits_NC
        return logits_NC.sigmoid() if self.label_kind == "multi" else logits_NC.softmax(1)

    def _place(self, network: nn.Module) -> tuple[torch.device, Precision, torch.memory_format]:
        tensors = (*network.parameters(), *network.buffers())
        device = tensors[0].device if tensors else torch.device("cpu")
        placement = self.placement
        if placement is None or placement.device.type != device.type:
            # Moved after its training: what its precision would cost there is unknown.
            return device, Precision("fp32", device.type), torch.contiguous_format
        return device, placement.precision, placement.layout(network)

    def _facts(self) -> dict[str, str]:
        """What the short forms show, by name."""
        metrics = self.metrics
        metric = headline(metrics)
        last, best = metrics.get(f"{metric}_last"), metrics.get(f"{metric}_best")
        reached = "not evaluated"
        if last is not None and best is not None:
            reached = f"last {last:.2%}, best {best:.2%} (epoch {metrics['best_epoch']})"
        facts = {HEADLINES[metric]: reached}
        if teacher := metrics.get("teacher"):
            judged = self.teacher_accuracy
            facts["teacher"] = teacher["name"] + (f" {judged:.2%}" if judged is not None else "")
        speed, seconds = metrics["images_per_s"], metrics["train_seconds"]
        facts["training"] = (
            f"{metrics['epochs']} epochs in {duration(seconds)}, {speed:,.0f} images/s"
        )
        facts["folder"] = str(self.run_dir or "none (out=FOLDER writes weights, metrics, curves)")
        return facts

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        title = f"Result of distill: {title_of(self.student)}"
        return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in facts.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(text)}</td></tr>'
            for name, text in self._facts().items()
        )
        title = f"Result of distill: {escape(title_of(self.student))}"
        return f'<table><caption style="text-align:left">{title}</caption>{rows}</table>'
