"""Whether a method does what it promises, on tiny models of all layouts; the start of a new one."""
