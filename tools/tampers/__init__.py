"""A small valid repository, and for each integrity rule a way to tamper with it."""
