"""What runs inside the engine: a controller around the server, an executor around a client."""
