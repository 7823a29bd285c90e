"""What is asked for on the command line: one file a verb, without torch."""
