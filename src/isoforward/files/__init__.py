"""What is kept on disk: whole or not at all, verified, and believed only as far as checked."""
