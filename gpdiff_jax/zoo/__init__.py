"""The parameter zoo: a pooled model, and every region's own parameters grown from it.

In: source regions and a model. Out: parameters of all regions, as pytrees, tokens and latents.
"""
