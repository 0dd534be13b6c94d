"""What all losses share: terms, needs, schedules, the registry and the catalogue."""
