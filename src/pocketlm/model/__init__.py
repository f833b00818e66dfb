"""One Transformer, four shapes: positions, layers, attention, cache, loss, transformer."""
