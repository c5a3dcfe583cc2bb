"""How files and programs get to a machine: one module a transport."""
