"""How a region behaves: an embedding of some days of its readings.

In: readings. Out: patches, a masked autoencoder over them, and what it says of a region.
"""
