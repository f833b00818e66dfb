"""From logits to tokens: sampling (pure functions) and the engine that decodes with a cache."""
