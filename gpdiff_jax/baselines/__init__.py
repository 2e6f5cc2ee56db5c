"""Everything that generated parameters have to beat; nothing here needs a trained generator.

In: a target city, or a zoo and prompts. Out: forecasts by rules, and parameters by null hypotheses.
"""
