"""What happens to the numbers while things break."""
