"""Image encoders that are models of their own: a method inside them, and no LLM behind."""
