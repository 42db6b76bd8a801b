"""The ``gumbel`` topology, all of it: the preprint's content router, its training, and what executes it."""
