"""How long a network takes where it runs: `measure` for code, `fastkd latency` for people."""

from fastkd.deploy.latency.measuring import measure, measure_all
from fastkd.deploy.latency.meter import QUICK, RULE, Rule
from fastkd.deploy.latency.record import Latency, LatencyReport

__all__ = ["QUICK", "RULE", "Latency", "LatencyReport", "Rule", "measure", "measure_all"]
