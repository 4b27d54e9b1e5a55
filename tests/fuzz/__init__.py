"""Coverage-guided fuzzing of the parsers of this repository: `make fuzz`."""
