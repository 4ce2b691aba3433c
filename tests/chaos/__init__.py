"""Tests of the numbers while parts of the service fail."""
