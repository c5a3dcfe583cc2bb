"""Deployable bundles: a model file that was run and compared with its network, and all one needs to run it."""
