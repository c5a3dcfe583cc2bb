"""Programs on a device that time a network's file: one module a program, its command line and its output."""
