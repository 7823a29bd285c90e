"""The methods, one file each, in a folder for the place where they act."""
