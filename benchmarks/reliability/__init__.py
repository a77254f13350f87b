"""The scenarios of benchmarks/reliability.py: one file for each group, and what they share."""
