"""What a model sees, on the device: series, windows, region graphs, sources and targets.

In: cities. Out: arrays that a program gathers its windows from.
"""
