"""`fastkd bench data`: how many images a second the loader, the step and both reach."""

import argparse

from fastkd.cli.running import recipe_of, session_of, settled
from fastkd.errors import UserError
from fastkd.runs.throughput import measure_throughput

__all__ = ["bench"]


def bench(options: argparse.Namespace) -> None:
    """Measure a recipe on this machine and print what limits it."""
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: expected more than 0")
    recipe = recipe_of(options.words)
    with session_of([recipe]) as session:
        found = measure_throughput(settled(recipe, session.world.device), session, options.seconds)
        if not session.world.is_main:
            return
        rates = {
            "loader alone": found["loader_images_per_s"],
            "step alone": found["step_images_per_s"],
            "both": found["both_images_per_s"],
        }
        print(
            f"{found['recipe']}: data.backend={found['backend']}, {found['workers']} workers, "
            f"batches of {found['batch_size']}, {found['device']}"
        )
        of = " of this process" if found["ranks"] > 1 else ""
        for name, rate in rates.items():
            print(f"  {name:<13}{rate:>9,.0f} images/s{of}")
        print(f"  the step waits {found['waits']:.0%} of the time")
        first, *more = found["limit"]
        print(f"The limit is {first}.")
        for sentence in more:
            print(f"  {sentence}")
