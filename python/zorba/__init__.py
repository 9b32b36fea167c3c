"""Zeroth-order fine-tuning of language models, alone or as a federation."""
