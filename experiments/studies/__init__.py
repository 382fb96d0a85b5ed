"""Studies over many runs: comparisons and audits."""
