"""Plan files on the command line: check one, print it, draw it."""
