"""What others do for the same job, in a few lines each, measured in the same run."""
