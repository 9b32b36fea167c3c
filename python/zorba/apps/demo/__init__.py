"""The demo: a federated zeroth-order fine-tune of SmolLM2-135M on one machine."""
