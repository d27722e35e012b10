"""What the command line can be asked for: a verb loads its configuration and calls one function; no torch before."""
