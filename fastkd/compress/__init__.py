"""A smaller student for a target: `fastkd compress`, and `compress` for programs.

Flow: `phases` runs everything in one folder, phase by phase. `space` says what may become of a
network, `table` what each choice costs on the target, `search` and `fisher` propose students,
`lessons` are the recipes that train them, `scaled` makes the honest baselines, `report` the table.
"""

from fastkd.compress.phases import Request, compress
from fastkd.compress.target import Target

__all__ = ["Request", "Target", "compress"]
