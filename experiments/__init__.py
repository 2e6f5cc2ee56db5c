"""Command-line experiments: absl flags in, files in an output folder out."""
