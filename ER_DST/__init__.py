"""ER_DST: dynamic sparse training that starts from random ER networks."""
