"""The report: what a run found, as one HTML page, and every plot of it as PNG and CSV."""
