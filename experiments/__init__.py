"""The verbs: each file parses its arguments, builds what they name, and calls the library."""
