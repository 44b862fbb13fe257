"""GPU kernels and the one place that knows JAX-version differences; imports nothing of jaxmem."""
