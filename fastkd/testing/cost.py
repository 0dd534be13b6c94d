"""Arithmetic of a training step, compared with a count of real steps in test_step_cost.py."""

__all__ = ["step_macs"]


def step_macs(student: float, teacher: float, method: str = "kd") -> float:
    """Multiply-accumulates of a training step per image, computed from the networks' counts.

    A forward pass counts once, the student's backward pass twice. method: "kd", "tlcutmix" (x and
    x'), "pick" (a pool of two x' scored by both networks, the teacher's answers used again) or
    "pick_teacher_entropy" (the pool scored by the teacher alone).
    """
    kd = 3 * student + teacher
    return {
        "kd": kd,
        "tlcutmix": 2 * kd,
        "pick": kd + 2 * (student + teacher) + 3 * student,
        "pick_teacher_entropy": kd + 2 * teacher + 3 * student,
    }[method]
