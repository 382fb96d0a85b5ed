"""Exact expectations of estimators on toy languages."""
