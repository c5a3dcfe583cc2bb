"""The devices that children are measured on: a transport and a runtime each."""
