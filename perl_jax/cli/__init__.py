"""The command: arguments to a config, a config to a call of the library."""
