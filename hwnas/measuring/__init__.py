"""Measuring: which children, the measuring loop, and whether a device can be measured on."""
