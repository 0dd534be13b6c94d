"""What all losses share: the term, its needs, its schedules, the registry and its pages."""
