"""What results say: errors, summaries over runs, diagnoses of a generator and of prompts.

In: forecasts, run folders, a zoo and its generator. Out: numbers and tables.
"""
