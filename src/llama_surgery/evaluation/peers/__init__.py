"""Other rules for what a query may read, under one executor and one account of density."""
