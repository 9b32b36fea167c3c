"""Everything that needs a GPU, checked and measured by one command: ``make gpu-check``."""
