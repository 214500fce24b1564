"""Benchmarks of lora_engine: see README.md beside this file."""
