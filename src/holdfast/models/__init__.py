"""Networks that take pixels in [0, 1], normalise inside and return logits; a factory by name; feature taps."""
