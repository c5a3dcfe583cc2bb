"""What runs networks on a device under Python: one file a runtime, sent there together with `worker.py`."""
