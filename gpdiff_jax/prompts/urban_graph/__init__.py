"""What a region is among others: an embedding of a knowledge graph of cities.

In: cities. Out: facts about their regions, and vectors that hold them.
"""
