"""Everything that needs a GPU, proven and measured by one command: ``make gpu-check``."""
