"""The bundled tiny models and the generators of their data: what runs with no hub and no GPU."""
