"""From parameters of a target's regions to forecasts.

In: starts for every region and its support days. Out: fine-tuned parameters, forecasts with and without truth.
"""
