"""Learning a topology on frozen weights."""
