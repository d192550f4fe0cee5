"""Evaluation of finished runs: metrics, calibration, robustness, latency and `summary.json`."""
