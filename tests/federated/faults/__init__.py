"""A server and its sites as processes that are killed: real kills and real files."""
