"""How well transformers know what they do not know: tasks, networks, contenders, and what is measured of them."""
