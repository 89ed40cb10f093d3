"""Strong lottery tickets: edge-popup inside a random sparse network."""
