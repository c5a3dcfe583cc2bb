"""Latency predictors: from an architecture to milliseconds on one device."""
