"""What is measured, and how; each module says how to run it."""
