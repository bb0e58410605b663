"""Benchmarks: whole measurements as ratios against peers in the same run, never a timed test."""
