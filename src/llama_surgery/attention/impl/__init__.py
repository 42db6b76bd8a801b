"""Ways to execute a plan. They share small things with each other but never import one another."""
