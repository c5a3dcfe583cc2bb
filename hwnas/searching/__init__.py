"""Searching: limits, strategies, and the search that confirms its answer on the device."""
