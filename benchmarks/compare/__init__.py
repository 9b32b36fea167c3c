"""ZorBA beside its baselines: one loop, one data split, one evaluation. See docs/compare.md."""
