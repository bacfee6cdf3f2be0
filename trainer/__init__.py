"""The learning side: the starter model, and the cycle that turns votes into a better policy."""
