"""Networks between the original and a student, for a distillation in stages that shrink."""

import math
from typing import Any

from fastkd.compress.student import Student
from fastkd.models.rewrite.shorten import stages_of

__all__ = ["steps_between"]


def steps_between(original: Student, student: Student, stages: int) -> list[Student]:
    """The students of all stages but the last, in order; empty for one stage.

    Each stage puts an equal share of the blocks in their places, those near the output first, and
    leaves out an equal share of the residual blocks. A student of another width has no way there in
    steps: it is trained in the same number of stages as itself.
    """
    if stages == 1:
        return []
    if student.name != original.name or _plain(student.options) != _plain(original.options):
        return [student] * (stages - 1)
    blocks = list(dict(student.options.get("blocks") or {}).items())
    depth = dict(student.options.get("depth") or {})
    full = {name: len(paths) for name, paths in stages_of(original.build(2)).items()}
    found = []
    for stage in range(1, stages):
        share = stage / stages
        changed = dict(blocks[len(blocks) - math.floor(share * len(blocks)) :])
        kept = {
            name: full[name] - math.floor(share * (full[name] - number))
            for name, number in depth.items()
        }
        kept = {name: number for name, number in kept.items() if number < full[name]}
        own: dict[str, Any] = {**_plain(student.options)}
        own |= {"blocks": changed} if changed else {}
        own |= {"depth": kept} if kept else {}
        found.append(Student(student.name, own, f"stage {stage} of {stages}"))
    return found


def _plain(options: Any) -> dict[str, Any]:
    return {key: one for key, one in options.items() if key not in ("blocks", "depth")}
