"""Programs that talk to a service: over the public API, like any other client."""
