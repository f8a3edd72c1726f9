"""The built-in rewards, one to a file."""
