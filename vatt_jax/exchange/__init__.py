"""Models as files that others read: programs for JAX alone, model cards, the Hugging Face hub."""
