"""Tests of jaxmem."""
