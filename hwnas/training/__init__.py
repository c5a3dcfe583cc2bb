"""Training a supernet: recipes, which children learn what in a step, the loop, one process or many."""
