"""Loading of Hugging Face models, by name or from a folder."""
