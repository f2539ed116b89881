"""The command line: parses arguments into a config and calls the library with it."""
