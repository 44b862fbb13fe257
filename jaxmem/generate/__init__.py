"""Continue token sequences with any model that keeps the decoder contract."""
