"""A server and its sites as processes that are killed: real kills, real files, a small transport.

``python -m tests.federated.faults --schedules 100`` runs random kill schedules and says whether
each run ended with the fingerprint of the run that nothing disturbed.
"""
