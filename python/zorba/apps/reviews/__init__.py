"""The film reviews that the demos and benchmarks share: SmolLM2-135M, Rotten Tomatoes and SST-2."""
