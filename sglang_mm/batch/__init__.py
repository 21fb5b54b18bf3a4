"""Batch jobs: a file of questions in, a file of answers out, kept through crashes of either side."""
