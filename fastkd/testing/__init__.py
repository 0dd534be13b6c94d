"""What tests and benchmarks share, by subject.

- tolerance.py: errors against float64, bounded by the error of plain torch
- inputs.py: numbers, weights and batches that are the same everywhere
- baselines.py: formulas as most training loops write them
- terms.py: a loss term without a trainer around it
- device.py: host synchronisation, CUDA graphs, the Triton interpreter
- clock.py: sides timed in turns, and the spread of their ratios
- cost.py: arithmetic of a training step
- recipes.py: words of recipes that train in a second
"""

from fastkd.testing.baselines import (
    eager_attention_loss,
    eager_dense_loss,
    eager_hardness,
    eager_kd_loss,
    eager_kd_rows,
    eager_step_rows,
    freshly_compiled,
)
from fastkd.testing.clock import (
    WARM_UP,
    Spread,
    forward_backward,
    interleave,
    speedup,
    spread,
    turns,
)
from fastkd.testing.cost import step_macs
from fastkd.testing.device import (
    captured,
    interpret_bf16_as_chips_do,
    interpret_fma_as_fused,
    no_host_sync,
)
from fastkd.testing.inputs import (
    fill_with_sines,
    fixed_state,
    hashed_values,
    kd_case,
    shape_id,
    sines,
)
from fastkd.testing.terms import bind_pair, bind_term, call_term, term_inputs
from fastkd.testing.tolerance import (
    assert_as_accurate,
    assert_loss_as_accurate,
    assert_mean_as_accurate,
    luck,
    rms,
    ulp,
)

__all__ = [
    "WARM_UP",
    "Spread",
    "assert_as_accurate",
    "assert_loss_as_accurate",
    "assert_mean_as_accurate",
    "bind_pair",
    "bind_term",
    "call_term",
    "captured",
    "eager_attention_loss",
    "eager_dense_loss",
    "eager_hardness",
    "eager_kd_loss",
    "eager_kd_rows",
    "eager_step_rows",
    "fill_with_sines",
    "fixed_state",
    "forward_backward",
    "freshly_compiled",
    "hashed_values",
    "interleave",
    "interpret_bf16_as_chips_do",
    "interpret_fma_as_fused",
    "kd_case",
    "luck",
    "no_host_sync",
    "rms",
    "shape_id",
    "sines",
    "speedup",
    "spread",
    "step_macs",
    "term_inputs",
    "turns",
    "ulp",
]
