"""Ahead-of-time compilation for accelerators that are not there."""
