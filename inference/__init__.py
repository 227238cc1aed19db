"""Everything that turns a model and a guide into numbers."""
