"""Measurements of speed and memory; each command prints one JSON line."""
