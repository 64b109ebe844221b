"""The command line: compare strategies on real layers, tell about this machine. Needs the extra ``compare``."""
