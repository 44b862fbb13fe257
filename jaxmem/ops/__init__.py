"""Pure functions on arrays: references, XLA forms and the choice between implementations."""
