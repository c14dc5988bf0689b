"""The schema's history. The wheel carries this folder as `service.migrations`."""
