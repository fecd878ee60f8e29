"""The first life: training under Lightning."""
