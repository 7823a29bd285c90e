"""The words that the command line, files and Python share: methods, fields and budgets as typed."""
