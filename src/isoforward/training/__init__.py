"""What surrounds training's steps: text, batches, several processes, stops and what one watches."""
