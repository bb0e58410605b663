"""Evaluation of frozen encoders: probes, metrics with intervals, the report page."""
