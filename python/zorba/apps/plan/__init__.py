"""``zorba plan``: a memory model that is calibrated once a machine, and masks that fit budgets."""
