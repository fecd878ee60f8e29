"""What each phase costs: time, FLOPs, memory, energy, and whether the numbers can be trusted."""
