"""The demo: a client of the public API like any other, with the data that it teaches."""
