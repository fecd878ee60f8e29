"""Both lives of one's own model in one offline page, to be touched."""
