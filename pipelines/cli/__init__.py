"""``amlora``: the command line, one file a family of commands. What they do is in the packages next to it."""
