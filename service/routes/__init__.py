"""The HTTP interface, one dialect or subject per file."""
