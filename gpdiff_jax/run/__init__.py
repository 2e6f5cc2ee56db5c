"""A run: stages that resume, methods that are compared, and results, in one folder."""
