"""The attention kernel for Hopper."""
