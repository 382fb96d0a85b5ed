"""Scripts: the only place that reads configurations and flags."""
