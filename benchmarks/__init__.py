"""One script per hot path; each prints one JSON object per line."""
