"""Data sets and generated problems: prompts, answers and reward columns.

A data set is a list of rows; a row is a dictionary with at least a 'prompt'.
"""
