"""Promises of docs/reliability.md, each tried with many inputs: `make torture`."""
